//! Failures that the libraries below the services tell: each gets the code and the ErrorInfo
//! that it has in the relay's contract.

use http::{HeaderMap, Response};
use tonic::{Code, Status, body::Body};

use super::RelayError;

/// Holds the details of a status that has some.
const DETAILS: &str = "grpc-status-details-bin";
const ACCEPTED: &str = "grpc-accept-encoding";

/// An answer whose status says what is wrong. `unknown` is the path of a call that is none of
/// the schema's.
pub(super) fn explained(answer: Response<Body>, unknown: Option<&str>) -> Response<Body> {
    let headers = answer.headers();
    if headers.get(Status::GRPC_STATUS).is_none() || headers.contains_key(DETAILS) {
        return answer;
    }
    let status = Status::from_header_map(headers);
    let Some(status) = status.filter(|status| status.code() != Code::Ok) else {
        return answer;
    };
    let is_unknown = unknown.is_some() && status.code() == Code::Unimplemented;
    let error = match unknown.filter(|_| is_unknown) {
        Some(path) => Some(RelayError::UnknownRpc(path.chars().take(256).collect())),
        None => of(&status),
    };
    let Some(error) = error else { return answer };
    let is_compressed = matches!(error, RelayError::Compressed(_));
    let mut answer = error.to_status().into_http();
    if is_compressed {
        accept_gzip(answer.headers_mut());
    }
    answer
}

/// The same for a status that ends a stream.
pub(super) fn explained_status(status: Status) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    of(&status).map_or(status, |error| error.to_status())
}

/// What the libraries say by a code of theirs; nothing where the code is right.
fn of(status: &Status) -> Option<RelayError> {
    let message = status.message().to_owned();
    Some(match status.code() {
        Code::OutOfRange => RelayError::MessageTooLarge(message),
        // The protocol has this code for it ("Compression", "Specific failures").
        Code::Internal if message.contains("compress") => RelayError::CompressedFlag(message),
        Code::Internal | Code::InvalidArgument => RelayError::Malformed(message),
        Code::Unimplemented => RelayError::Compressed(message),
        _ => return None,
    })
}

fn accept_gzip(headers: &mut HeaderMap) {
    headers.insert(ACCEPTED, http::HeaderValue::from_static("identity,gzip"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code_of(status: Status, unknown: Option<&str>) -> (Code, String) {
        let answer = explained(status.into_http(), unknown);
        let status = Status::from_header_map(answer.headers()).expect("a status");
        (status.code(), status.message().to_owned())
    }

    #[test]
    fn failures_of_the_libraries_have_the_codes_of_the_contract() {
        let rows = [
            (Code::OutOfRange, None, Code::ResourceExhausted),
            (Code::Internal, None, Code::InvalidArgument),
            (Code::InvalidArgument, None, Code::InvalidArgument),
            (Code::Unimplemented, None, Code::Unimplemented),
            (Code::Unimplemented, Some("/a.B/C"), Code::Unimplemented),
            (Code::Cancelled, None, Code::Cancelled),
            (Code::NotFound, Some("/a.B/C"), Code::NotFound),
        ];
        for (code, unknown, expected) in rows {
            let (found, message) = code_of(Status::new(code, "why"), unknown);
            assert_eq!(found, expected, "{code:?}");
            let named = unknown.filter(|_| code == Code::Unimplemented);
            assert!(message.contains(named.unwrap_or("why")), "{message}");
        }
    }

    #[test]
    fn what_has_details_stays() {
        let full = RelayError::Draining.to_status();
        let (code, message) = code_of(full.clone(), Some("/a.B/C"));
        assert_eq!((code, message.as_str()), (full.code(), full.message()));
    }
}
