//! API keys: a file of hashes, so that who reads the file cannot ask.
//!
//! A line is `read HASH` or `admin HASH`, HASH the SHA-256 of a key in hexadecimal; what follows is a comment, as is a
//! line that begins with `#`. `read` may ask and look, `admin` may also upload, remove and roll back.

use std::path::Path;

use axum::http::{HeaderMap, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::problem::Problem;
use crate::error::{Error, Result};

/// What a key allows; each allows what those before it do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Read,
    Admin,
}

/// The keys that a server knows.
pub(super) struct Keys(Vec<(Role, [u8; 32])>);

impl Keys {
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, a line of another form, no key at all.
    pub(super) fn load(path: &Path) -> Result<Keys> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let mut keys = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let mut words = line.split_whitespace();
            let role = match words.next() {
                None => continue,
                Some(word) if word.starts_with('#') => continue,
                Some("read") => Some(Role::Read),
                Some("admin") => Some(Role::Admin),
                Some(_) => None,
            };
            let key = role.zip(words.next().and_then(digest_of_hex));
            let expected = "expected `read HASH` or `admin HASH`, HASH the SHA-256 of a key as 64 hexadecimal digits \
                            (printf %s \"$KEY\" | sha256sum)";
            keys.push(key.ok_or_else(|| Error::line(path, i as u64 + 1, expected))?);
        }
        if keys.is_empty() {
            return Err(Error::content(path, "there is no key in it, so nobody could ask anything"));
        }
        Ok(Keys(keys))
    }

    /// Whether a request's key allows what it asks.
    ///
    /// # Errors
    ///
    /// 401 without a known key, 403 with one that does not allow it.
    pub(super) fn check(&self, headers: &HeaderMap, needed: Role) -> Result<(), Problem> {
        let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let given = bearer.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes()));
        let unauthorized = |message| Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", message);
        let given = given.ok_or_else(|| unauthorized("this server wants a key: Authorization: Bearer KEY"))?;
        let digest: [u8; 32] = Sha256::digest(given.trim_ascii()).into();
        // Every key is compared, each in constant time, so that the time tells nothing of which came near.
        let matching = self.0.iter().filter(|(_, key)| bool::from(key[..].ct_eq(&digest[..]))).map(|(role, _)| *role);
        match matching.max() {
            None => Err(unauthorized("the key is not known here")),
            Some(role) if role < needed => Err(Problem::new(
                StatusCode::FORBIDDEN,
                "forbidden",
                "this key may ask, and not change: it wants role admin",
            )),
            Some(_) => Ok(()),
        }
    }
}

fn digest_of_hex(hex: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    for (i, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Result<Keys> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, text).unwrap();
        Keys::load(&path)
    }

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        [(name.parse().unwrap(), value.parse().unwrap())].into_iter().collect::<HeaderMap>()
    }

    #[test]
    fn a_key_allows_what_its_role_says() {
        // SHA-256 of "abc" and of "", from FIPS 180-2's examples.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let keys = keys(&format!("# who\n\nread {abc} the page\n")).unwrap();
        assert_eq!(keys.check(&headers("authorization", "Bearer abc"), Role::Read), Ok(()));
        assert_eq!(keys.check(&headers("x-api-key", "abc"), Role::Read), Ok(()));
        let status = |headers: &HeaderMap, role| keys.check(headers, role).unwrap_err().status.as_u16();
        assert_eq!(status(&headers("x-api-key", "abc"), Role::Admin), 403);
        assert_eq!(status(&headers("x-api-key", "abd"), Role::Read), 401);
        assert_eq!(status(&headers("authorization", "Basic abc"), Role::Read), 401);
        assert_eq!(status(&HeaderMap::new(), Role::Read), 401);
    }

    #[test]
    fn a_file_that_says_something_else_is_refused_with_its_line() {
        let message = |text: &str| keys(text).map(|_| ()).unwrap_err().to_string();
        assert!(message("read abc\n").contains("keys:1: expected `read HASH`"));
        assert!(message(&format!("# ok\nowner {}\n", "0".repeat(64))).contains("keys:2: "));
        assert!(message("# nothing\n").contains("no key"));
    }
}
