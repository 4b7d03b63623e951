//! Who asks: the key that was presented, wherever the client's API puts its credential.

use std::net::IpAddr;
use std::sync::Arc;

use http::header::AUTHORIZATION;
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use ledger::Timestamp;

use crate::keys::{KeyRecord, KeyRing, looks_like_key};
use crate::refusal::Refusal;
use crate::settings::Anonymous;

/// The one who asks.
#[derive(Clone)]
pub(crate) struct Caller {
    /// The key's record; `None` for an anonymous caller.
    pub key: Option<Arc<KeyRecord>>,
    /// The key in clear, to keep it from the upstream.
    pub presented: Option<String>,
}

/// Finds the caller's key. Unknown, expired and withdrawn keys get the same answer, so that it says nothing about them.
pub(crate) fn identify(
    head: &Parts,
    keys: &KeyRing,
    anonymous: Anonymous,
    peer: IpAddr,
    now: Timestamp,
) -> Result<Caller, Refusal> {
    let Some(presented) = presented(&head.headers, head.uri.query()) else {
        let welcome = match anonymous {
            Anonymous::Always => true,
            Anonymous::WhenNoKeys => keys.is_empty(),
            Anonymous::Never => false,
        };
        let message =
            "a Farthing key is needed: send it as `Authorization: Bearer fk-…`, `x-api-key` or `x-goog-api-key`";
        let refusal = || Refusal::new(StatusCode::UNAUTHORIZED, message);
        return if welcome { Ok(Caller { key: None, presented: None }) } else { Err(refusal()) };
    };
    let Some(key) = keys.find(presented).filter(|key| key.is_valid_at(now)) else {
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "the Farthing key is not valid"));
    };
    if !key.allows_source(peer) {
        return Err(Refusal::new(StatusCode::FORBIDDEN, "the Farthing key may not be used from this address"));
    }
    Ok(Caller { key: Some(Arc::clone(key)), presented: Some(presented.to_owned()) })
}

/// The first credential that is meant for us; others are the upstream's business.
fn presented<'a>(headers: &'a HeaderMap, query: Option<&'a str>) -> Option<&'a str> {
    let bearer = headers.get_all(AUTHORIZATION).iter().filter_map(|value| {
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
    });
    let plain = ["x-api-key", "api-key", "x-goog-api-key"].into_iter().flat_map(|name| headers.get_all(name));
    let plain = plain.filter_map(|value| value.to_str().ok());
    let query = query.into_iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.strip_prefix("key="));
    bearer.chain(plain).chain(query).find(|text| looks_like_key(text))
}

#[cfg(test)]
mod tests {
    use http::Request;
    use ledger::KeyId;

    use super::*;
    use crate::keys::{PlainKey, mint};

    const NOW: Timestamp = Timestamp::from_micros(1_000);

    fn ring(change: impl FnOnce(&mut KeyRecord)) -> (PlainKey, KeyRing) {
        let (key, hash) = mint([5; 32], &[9; 32]);
        let mut record = KeyRecord::new(KeyId::new(NOW, [1; 10]), hash);
        change(&mut record);
        (key, KeyRing::new([9; 32], [record]))
    }

    fn status(keys: &KeyRing, anonymous: Anonymous, uri: &str, header: Option<(&str, String)>) -> Result<bool, u16> {
        let mut request = Request::get(uri);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let head = request.body(()).unwrap().into_parts().0;
        let caller = identify(&head, keys, anonymous, [127, 0, 0, 1].into(), NOW);
        caller.map(|caller| caller.key.is_some()).map_err(|refusal| refusal.status.as_u16())
    }

    #[test]
    fn a_key_is_found_wherever_its_api_puts_it() {
        let (key, ring) = ring(|_| {});
        let key = key.reveal();
        let never = Anonymous::Never;
        for (name, value) in [
            ("authorization", format!("Bearer {key}")),
            ("authorization", format!("bearer {key}")),
            ("x-api-key", key.to_owned()),
            ("x-goog-api-key", key.to_owned()),
        ] {
            assert_eq!(status(&ring, never, "/v1/models", Some((name, value))), Ok(true), "{name}");
        }
        assert_eq!(status(&ring, never, &format!("/v1beta/models?a=1&key={key}"), None), Ok(true));
        assert_eq!(status(&ring, never, "/", Some(("authorization", format!("Bearer {key}x")))), Err(401));
        assert_eq!(status(&ring, never, "/", None), Err(401));
    }

    #[test]
    fn strangers_are_let_in_by_policy_only() {
        let (_, some) = ring(|_| {});
        let none = KeyRing::new([0; 32], []);
        let as_stranger =
            |ring: &KeyRing, policy| status(ring, policy, "/", Some(("authorization", "Bearer sk-1".into())));
        assert_eq!(as_stranger(&none, Anonymous::WhenNoKeys), Ok(false));
        assert_eq!(as_stranger(&some, Anonymous::WhenNoKeys), Err(401));
        assert_eq!(as_stranger(&some, Anonymous::Always), Ok(false));
        assert_eq!(as_stranger(&none, Anonymous::Never), Err(401));
    }

    #[test]
    fn expiry_and_source_are_checked() {
        let header = |key: &PlainKey| Some(("x-api-key", key.reveal().to_owned()));
        let (key, expired) = ring(|key| key.expires_at = Some(NOW));
        assert_eq!(status(&expired, Anonymous::Always, "/", header(&key)), Err(401));
        let (key, elsewhere) = ring(|key| key.networks = vec!["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(status(&elsewhere, Anonymous::Always, "/", header(&key)), Err(403));
    }
}
