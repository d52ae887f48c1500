//! What is gRPC at all. Other protocols that come over HTTP/2 (gRPC-Web, JSON, a browser) are
//! refused before their body is read: their clients could not read the answer, and would
//! report a failure of what was done.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body_util::Full;
use tonic::body::Body;

const NOT_POST: &str = "gRPC calls are POST requests\n";
const NOT_GRPC: &str =
    "the content-type has to be application/grpc or application/grpc+proto: use a gRPC client\n";

/// The answer to a request that is no call of gRPC ("gRPC over HTTP/2", "Requests").
pub(super) fn refusal<B>(request: &Request<B>) -> Option<Response<Body>> {
    let (status, text) = if request.method() != Method::POST {
        (StatusCode::METHOD_NOT_ALLOWED, NOT_POST)
    } else if !is_grpc(request.headers()) {
        (StatusCode::UNSUPPORTED_MEDIA_TYPE, NOT_GRPC)
    } else {
        return None;
    };
    let mut response = Response::new(Body::empty());
    if request.method() != Method::HEAD {
        let body = Full::new(Bytes::from_static(text.as_bytes()));
        *response.body_mut() = Body::new(body);
    }
    *response.status_mut() = status;
    let headers = response.headers_mut();
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    headers.insert(CONTENT_TYPE, plain);
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("POST"));
    }
    Some(response)
}

/// Whether the body has messages of gRPC in protobuf. Parameters change nothing.
fn is_grpc(headers: &HeaderMap) -> bool {
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    let (Some(one), None) = (types.next(), types.next()) else {
        return false;
    };
    let Ok(text) = one.to_str() else {
        return false;
    };
    let media = text.split(';').next().unwrap_or_default().trim();
    ["application/grpc", "application/grpc+proto"]
        .iter()
        .any(|known| media.eq_ignore_ascii_case(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(method: Method, types: &[&str]) -> u16 {
        let mut request = Request::new(());
        *request.method_mut() = method;
        for one in types {
            let value = HeaderValue::from_bytes(one.as_bytes()).expect("a header");
            request.headers_mut().append(CONTENT_TYPE, value);
        }
        refusal(&request).map_or(200, |response| response.status().as_u16())
    }

    #[test]
    fn grpc_in_protobuf_is_taken_with_any_parameters() {
        for taken in [
            "application/grpc",
            "application/grpc+proto",
            "Application/gRPC",
            "application/grpc;charset=utf-8",
            "application/grpc+proto ; a=b; c",
        ] {
            assert_eq!(answered(Method::POST, &[taken]), 200, "{taken}");
        }
    }

    #[test]
    fn other_types_are_refused() {
        for other in [
            "",
            "application/grpc-web",
            "application/grpc-web+proto",
            "application/grpc+json",
            "application/grpc+",
            "application/grpcx",
            "application/json",
            "application/x-protobuf",
            "text/plain",
            "grpc",
            "; application/grpc",
            "application/grpc, application/grpc",
            "\u{e9}",
        ] {
            assert_eq!(answered(Method::POST, &[other]), 415, "{other}");
        }
        assert_eq!(answered(Method::POST, &[]), 415, "none");
        let two = ["application/grpc", "application/grpc"];
        assert_eq!(answered(Method::POST, &two), 415, "two");
    }

    #[test]
    fn other_methods_are_refused() {
        for method in ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "post"] {
            let method = Method::from_bytes(method.as_bytes()).expect("a method");
            let status = answered(method.clone(), &["application/grpc"]);
            assert_eq!(status, 405, "{method}");
        }
    }
}
