//! PrivacyService: in the schema already, filled in by a later version.

use tonic::{Request, Response, Status};

use super::RelayError;
use crate::proto::{
    EraseSubjectRequest, EraseSubjectResponse, privacy_service_server::PrivacyService,
};

pub(super) struct Privacy;

#[tonic::async_trait]
impl PrivacyService for Privacy {
    async fn erase_subject(
        &self,
        _: Request<EraseSubjectRequest>,
    ) -> Result<Response<EraseSubjectResponse>, Status> {
        Err(RelayError::NotImplemented("EraseSubject").into())
    }
}
