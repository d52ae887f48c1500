//! Server reflection, `grpc.reflection.v1` and `v1alpha`: the schema with its comments.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{
    StreamExt, future,
    stream::{self, BoxStream},
};
use prost::Message;
use prost_reflect::{DescriptorError, DescriptorPool, prost_types::FileDescriptorSet};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming, service::Routes};
use tonic_reflection::pb::{
    v1::{
        self, ErrorResponse, ExtensionNumberResponse, FileDescriptorResponse, ListServiceResponse,
        ServerReflectionRequest, ServerReflectionResponse, ServiceResponse,
        server_reflection_request::MessageRequest as Question,
        server_reflection_response::MessageResponse as Answer,
        server_reflection_server::{ServerReflection, ServerReflectionServer},
    },
    v1alpha::{
        self,
        server_reflection_server::{
            ServerReflection as AlphaReflection, ServerReflectionServer as AlphaServer,
        },
    },
};

use super::RelayError;
use crate::proto;

/// Longest question, in bytes: it has a name.
const MAX_QUESTION_BYTES: usize = 4_096;

type Answers<T> = BoxStream<'static, Result<T, Status>>;

/// What is known of the schema.
#[derive(Debug, Default)]
struct Schema {
    services: Vec<ServiceResponse>,
    /// Each file as it was compiled, by its name.
    files: BTreeMap<String, Bytes>,
    /// The file of each symbol.
    symbols: HashMap<String, String>,
    pool: DescriptorPool,
}

/// Answers the questions of a stream, until the relay drains.
#[derive(Clone)]
struct Reflection {
    schema: Arc<Schema>,
    draining: CancellationToken,
}

/// Adds both versions of the service.
///
/// # Errors
/// The compiled descriptors are damaged.
pub fn with_reflection(
    routes: Routes,
    draining: CancellationToken,
) -> Result<Routes, DescriptorError> {
    let schema = Arc::new(Schema::read()?);
    let service = Reflection { schema, draining };
    let alpha = AlphaServer::new(service.clone()).max_decoding_message_size(MAX_QUESTION_BYTES);
    let current =
        ServerReflectionServer::new(service).max_decoding_message_size(MAX_QUESTION_BYTES);
    Ok(routes.add_service(current).add_service(alpha))
}

impl Schema {
    fn read() -> Result<Self, DescriptorError> {
        let mut schema = Self::default();
        for set in [
            proto::FILE_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            // So that a client that knows nothing can read the details of an error.
            tonic_types::pb::FILE_DESCRIPTOR_SET,
            v1::FILE_DESCRIPTOR_SET,
            v1alpha::FILE_DESCRIPTOR_SET,
        ] {
            // Sets share files of google/protobuf; the first has their comments.
            let files = FileDescriptorSet::decode(set).unwrap_or_default().file;
            let is_new = |name: &str| schema.pool.get_file_by_name(name).is_none();
            let new: Vec<_> = files
                .into_iter()
                .filter(|file| is_new(file.name()))
                .collect();
            schema.pool.add_file_descriptor_protos(new)?;
        }
        schema.index();
        Ok(schema)
    }

    fn index(&mut self) {
        let Self {
            services,
            files,
            symbols,
            pool,
        } = self;
        for file in pool.files() {
            files.insert(file.name().to_owned(), file.encode_to_vec().into());
        }
        let mut note = |symbol: String, file: &str| {
            symbols.insert(symbol, file.to_owned());
        };
        for message in pool.all_messages() {
            let file = message.parent_file();
            note(message.full_name().to_owned(), file.name());
            for field in message.fields() {
                note(field.full_name().to_owned(), file.name());
            }
            for oneof in message.oneofs() {
                note(oneof.full_name().to_owned(), file.name());
            }
        }
        for kind in pool.all_enums() {
            let file = kind.parent_file();
            note(kind.full_name().to_owned(), file.name());
            for value in kind.values() {
                // A value is a sibling of its enum; many tools name it below the enum.
                note(value.full_name().to_owned(), file.name());
                note(
                    format!("{}.{}", kind.full_name(), value.name()),
                    file.name(),
                );
            }
        }
        for service in pool.services() {
            let file = service.parent_file();
            note(service.full_name().to_owned(), file.name());
            for method in service.methods() {
                note(method.full_name().to_owned(), file.name());
            }
            services.push(ServiceResponse {
                name: service.full_name().to_owned(),
            });
        }
    }

    fn answer(&self, question: Option<&Question>) -> Answer {
        let found = match question {
            Some(Question::ListServices(_)) => {
                let service = self.services.clone();
                return Answer::ListServicesResponse(ListServiceResponse { service });
            }
            Some(Question::FileByFilename(name)) => self
                .file(name)
                .ok_or_else(|| format!("there is no file `{name}`")),
            Some(Question::FileContainingSymbol(name)) => {
                // Some tools begin full names with a dot.
                let file = self.symbols.get(name.trim_start_matches('.'));
                file.and_then(|file| self.file(file))
                    .ok_or_else(|| format!("there is no symbol `{name}`"))
            }
            Some(Question::FileContainingExtension(asked)) => {
                let (kind, number) = (&asked.containing_type, asked.extension_number);
                Err(format!("there is no extension {number} of `{kind}`"))
            }
            Some(Question::AllExtensionNumbersOfType(name)) => {
                if self.pool.get_message_by_name(name).is_some() {
                    return Answer::AllExtensionNumbersResponse(ExtensionNumberResponse {
                        base_type_name: name.clone(),
                        extension_number: Vec::new(),
                    });
                }
                Err(format!("there is no message `{name}`"))
            }
            None => {
                return Answer::ErrorResponse(ErrorResponse {
                    error_code: Code::InvalidArgument.into(),
                    error_message: "the request asks nothing: set message_request".to_owned(),
                });
            }
        };
        match found {
            Ok(file) => Answer::FileDescriptorResponse(FileDescriptorResponse {
                file_descriptor_proto: vec![file.into()],
            }),
            Err(error_message) => Answer::ErrorResponse(ErrorResponse {
                error_code: Code::NotFound.into(),
                error_message,
            }),
        }
    }

    fn file(&self, name: &str) -> Option<Bytes> {
        self.files.get(name).cloned()
    }
}

impl Reflection {
    /// One answer for each question. An error is one of them, and the stream goes on.
    fn answers<Q, A>(
        &self,
        questions: Streaming<Q>,
        answer: impl Fn(&Schema, Q) -> Result<A, Status> + Send + 'static,
    ) -> Answers<A>
    where
        Q: Send + 'static,
        A: Send + 'static,
    {
        let (schema, draining) = (Arc::clone(&self.schema), self.draining.clone());
        let answers = questions.map(move |question| answer(&schema, question?));
        let end = stream::once(future::lazy(move |_| draining.is_cancelled()))
            .filter(|is_draining| future::ready(*is_draining))
            .map(|_| Err(RelayError::Draining.into()));
        let until = self.draining.clone().cancelled_owned();
        answers.take_until(until).chain(end).boxed()
    }
}

fn answered(schema: &Schema, question: ServerReflectionRequest) -> ServerReflectionResponse {
    ServerReflectionResponse {
        valid_host: question.host.clone(),
        message_response: Some(schema.answer(question.message_request.as_ref())),
        original_request: Some(question),
    }
}

#[tonic::async_trait]
impl ServerReflection for Reflection {
    type ServerReflectionInfoStream = Answers<ServerReflectionResponse>;

    async fn server_reflection_info(
        &self,
        request: Request<Streaming<ServerReflectionRequest>>,
    ) -> Result<Response<Self::ServerReflectionInfoStream>, Status> {
        let answer = |schema: &Schema, question| Ok(answered(schema, question));
        Ok(Response::new(self.answers(request.into_inner(), answer)))
    }
}

/// The older version has the same messages under other names.
#[tonic::async_trait]
impl AlphaReflection for Reflection {
    type ServerReflectionInfoStream = Answers<v1alpha::ServerReflectionResponse>;

    async fn server_reflection_info(
        &self,
        request: Request<Streaming<v1alpha::ServerReflectionRequest>>,
    ) -> Result<Response<Self::ServerReflectionInfoStream>, Status> {
        let answer = |schema: &Schema, question: v1alpha::ServerReflectionRequest| {
            let question = same(&question)?;
            same(&answered(schema, question))
        };
        Ok(Response::new(self.answers(request.into_inner(), answer)))
    }
}

/// A message as one that is written alike.
fn same<T: Message + Default>(message: &impl Message) -> Result<T, Status> {
    T::decode(message.encode_to_vec().as_slice())
        .map_err(|error| Status::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use prost_reflect::prost_types::FileDescriptorProto;

    use super::*;

    fn file_of(schema: &Schema, symbol: &str) -> Option<FileDescriptorProto> {
        let question = Question::FileContainingSymbol(symbol.to_owned());
        match schema.answer(Some(&question)) {
            Answer::FileDescriptorResponse(found) => {
                let [file] = &found.file_descriptor_proto[..] else {
                    return None;
                };
                Some(FileDescriptorProto::decode(&file[..]).expect("a file"))
            }
            _ => None,
        }
    }

    #[test]
    fn every_kind_of_symbol_is_found_and_no_other() {
        let schema = Schema::read().expect("the descriptors are sound");
        let package = "jebbit.segmentrelay.v1";
        for symbol in [
            "SegmentRelay",
            "SegmentRelay.CaptureStream",
            "Capture",
            "Capture.email",
            "AttributeValue.kind",
            "DeliveryState",
            "DELIVERY_STATE_QUEUED",
            "DeliveryState.DELIVERY_STATE_QUEUED",
        ] {
            let found = file_of(&schema, &format!("{package}.{symbol}"));
            let found = found.unwrap_or_else(|| panic!("{symbol} is not found"));
            assert_eq!(found.package(), package, "{symbol}");
        }
        for found in [
            "grpc.health.v1.Health.Watch",
            "google.rpc.ErrorInfo",
            "google.protobuf.Timestamp",
            "grpc.reflection.v1alpha.ServerReflection",
            ".jebbit.segmentrelay.v1.Capture",
        ] {
            assert!(file_of(&schema, found).is_some(), "{found}");
        }
        for other in ["", package, "jebbit.segmentrelay.v1.NoSuch", "Capture"] {
            assert!(file_of(&schema, other).is_none(), "{other}");
        }
    }

    #[test]
    fn files_have_their_comments() {
        let schema = Schema::read().expect("the descriptors are sound");
        let file = file_of(&schema, "jebbit.segmentrelay.v1.Capture").expect("found");
        let places = file.source_code_info.expect("comments").location;
        assert!(places.iter().any(|place| place.leading_comments.is_some()));
    }
}
