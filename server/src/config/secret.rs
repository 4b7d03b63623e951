//! Secrets by reference: the configuration says where one is, never what it is.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

/// Where a secret is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretRef {
    /// In this environment variable.
    Env(String),
    /// In this file, surrounding white space removed.
    File(PathBuf),
}

/// Looks up an environment variable.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

impl SecretRef {
    /// Reads the secret; a relative file is looked for beside the configuration file.
    ///
    /// # Errors
    /// One sentence that names the reference and never the secret.
    pub fn read(&self, beside: &Path, environment: Environment<'_>) -> Result<String, String> {
        let secret = match self {
            SecretRef::Env(name) => {
                environment(name).ok_or_else(|| format!("the environment variable {name} is not set"))?
            }
            SecretRef::File(path) => {
                let path = beside.join(path);
                std::fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?
            }
        };
        let secret = secret.trim();
        if secret.is_empty() { Err(format!("the secret in {self} is empty")) } else { Ok(secret.to_owned()) }
    }
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretRef::Env(name) => write!(f, "{{ env = \"{name}\" }}"),
            SecretRef::File(path) => write!(f, "{{ file = \"{}\" }}", path.display()),
        }
    }
}

const HOW: &str =
    "a secret is never written into the configuration; refer to it: { env = \"NAME\" } or { file = \"PATH\" }";

impl<'de> Deserialize<'de> for SecretRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SecretRef, D::Error> {
        deserializer.deserialize_any(SecretVisitor)
    }
}

struct SecretVisitor;

impl<'de> Visitor<'de> for SecretVisitor {
    type Value = SecretRef;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{ env = \"NAME\" } or { file = \"PATH\" }")
    }

    // The value itself is never repeated in the message: it may be the secret.
    fn visit_str<E: de::Error>(self, _: &str) -> Result<SecretRef, E> {
        Err(E::custom(HOW))
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<SecretRef, E> {
        Err(E::custom(HOW))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<SecretRef, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            let next = match key.as_str() {
                "env" => SecretRef::Env(map.next_value()?),
                "file" => SecretRef::File(map.next_value()?),
                other => return Err(de::Error::unknown_field(other, &["env", "file"])),
            };
            if found.replace(next).is_some() {
                return Err(de::Error::custom("a secret has one place: either `env` or `file`"));
            }
        }
        found.ok_or_else(|| de::Error::custom(HOW))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Holder {
        token: SecretRef,
    }

    #[test]
    fn only_references_are_taken_and_a_plain_secret_is_not_repeated() {
        let holder: Holder = toml::from_str("token = { env = \"TOKEN\" }").unwrap();
        assert_eq!(holder.token, SecretRef::Env("TOKEN".to_owned()));
        for bad in ["token = \"hunter2\"", "token = 5", "token = {}", "token = { env = \"A\", file = \"b\" }"] {
            let message = toml::from_str::<Holder>(bad).unwrap_err().message().to_owned();
            assert!(!message.contains("hunter2"), "{message}");
            assert!(message.contains("env"), "{bad}: {message}");
        }
    }

    #[test]
    fn a_missing_or_empty_secret_is_an_error_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), " s3cret\n").unwrap();
        let environment: Environment<'_> = &|name| (name == "EMPTY").then(String::new);
        assert_eq!(SecretRef::File("token".into()).read(folder.path(), environment), Ok("s3cret".to_owned()));
        assert!(SecretRef::File("none".into()).read(folder.path(), environment).is_err());
        assert!(SecretRef::Env("NONE".into()).read(folder.path(), environment).unwrap_err().contains("NONE"));
        assert!(SecretRef::Env("EMPTY".into()).read(folder.path(), environment).unwrap_err().contains("empty"));
    }
}
