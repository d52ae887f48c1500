//! DeadLetterService: in the schema already, filled in by a later version.

use tonic::{Request, Response, Status};

use super::RelayError;
use crate::proto::{
    DiscardDeadLettersRequest, DiscardDeadLettersResponse, ListDeadLettersRequest,
    ListDeadLettersResponse, ReplayDeadLettersRequest, ReplayDeadLettersResponse,
    dead_letter_service_server::DeadLetterService,
};

pub(super) struct DeadLetters;

#[tonic::async_trait]
impl DeadLetterService for DeadLetters {
    async fn list_dead_letters(
        &self,
        _: Request<ListDeadLettersRequest>,
    ) -> Result<Response<ListDeadLettersResponse>, Status> {
        Err(RelayError::NotImplemented("ListDeadLetters").into())
    }

    async fn replay_dead_letters(
        &self,
        _: Request<ReplayDeadLettersRequest>,
    ) -> Result<Response<ReplayDeadLettersResponse>, Status> {
        Err(RelayError::NotImplemented("ReplayDeadLetters").into())
    }

    async fn discard_dead_letters(
        &self,
        _: Request<DiscardDeadLettersRequest>,
    ) -> Result<Response<DiscardDeadLettersResponse>, Status> {
        Err(RelayError::NotImplemented("DiscardDeadLetters").into())
    }
}
