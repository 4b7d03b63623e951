//! Who may ask the API.

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::ApiError;

/// Lets a request through that carries the admin token, or any where none is set.
pub async fn required(State(state): State<super::State>, request: Request, next: Next) -> Response {
    let Some(token) = &state.token else { return next.run(request).await };
    let presented = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let presented = presented.and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    if presented.is_some_and(|presented| same(presented, token)) {
        next.run(request).await
    } else {
        ApiError::unauthorized().into_response()
    }
}

/// Without a token only this machine may ask, and only by a name of this machine: a web page elsewhere can have its own
/// name resolve to 127.0.0.1, but the browser still sends that name.
pub async fn same_host(State(state): State<super::State>, request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if state.token.is_some() || is_local(host) {
        next.run(request).await
    } else {
        ApiError::forbidden("without an admin token only localhost may ask").into_response()
    }
}

/// Compares hashes, which `blake3` does in constant time: neither length nor content shows in the time it takes.
fn same(presented: &str, token: &str) -> bool {
    blake3::hash(presented.as_bytes()) == blake3::hash(token.as_bytes())
}

fn is_local(host: &str) -> bool {
    let Ok(authority) = host.parse::<http::uri::Authority>() else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for local in ["localhost", "localhost:4001", "127.0.0.1:4001", "[::1]:4001", "127.0.0.9"] {
            assert!(is_local(local), "{local}");
        }
        for remote in ["", "evil.example", "127.0.0.1.evil.example:4001", "192.0.2.1", "localhost.evil.example"] {
            assert!(!is_local(remote), "{remote}");
        }
    }

    #[test]
    fn tokens_are_compared_whole() {
        assert!(same("abc", "abc"));
        assert!(!same("ab", "abc") && !same("abcd", "abc") && !same("", "abc"));
    }
}
