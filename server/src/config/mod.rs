//! The configuration: one TOML file, read and checked before anything starts.

mod check;
mod check_fleet;
mod fleet;
mod place;
mod scale;
mod secret;
mod sections;
mod settings;

use std::path::{Path, PathBuf};

pub use check::{Standing, check};
pub use check_fleet::{mig_slice, warnings};
pub use fleet::*;
pub use place::nearest;
pub use scale::*;
pub use secret::SecretRef;
pub use sections::*;
pub use settings::{policies, price_book, settings};

/// A configuration and where it came from.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// What it says.
    pub config: Config,
    /// The file, unless the defaults are in use.
    pub file: Option<PathBuf>,
}

impl Loaded {
    /// The folder that relative paths in the configuration start from.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.file.as_deref().and_then(Path::parent).unwrap_or(Path::new(""))
    }

    /// The file's path beside the configuration, or the path itself when absolute.
    #[must_use]
    pub fn beside(&self, path: &Path) -> PathBuf {
        self.folder().join(path)
    }

    /// Reads a secret that the configuration refers to.
    ///
    /// # Errors
    /// One sentence that names the reference and never the secret.
    pub fn secret(&self, reference: &SecretRef) -> anyhow::Result<String> {
        reference.read(self.folder(), &|name| std::env::var(name).ok()).map_err(anyhow::Error::msg)
    }
}

/// Reads the configuration file, or takes the defaults when there is none.
///
/// # Errors
/// One line that names file, line and key, and how to put it right.
pub fn load(file: Option<&Path>) -> anyhow::Result<Loaded> {
    let Some(file) = file else { return Ok(Loaded::default()) };
    let bytes = std::fs::read(file).map_err(|error| anyhow::anyhow!("cannot read {}: {error}", file.display()))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..good].iter().filter(|&&byte| byte == b'\n').count();
        anyhow::anyhow!("{}:{line}: the file is not UTF-8 text", file.display())
    })?;
    let config =
        parse(&text).map_err(|mistake| anyhow::anyhow!("{}:{}: {}", file.display(), mistake.line, mistake.message))?;
    Ok(Loaded { config, file: Some(file.to_owned()) })
}

/// Reads a configuration's text.
///
/// # Errors
/// The first mistake, with its place.
pub fn parse(text: &str) -> Result<Config, place::Mistake> {
    toml::from_str(text).map_err(|error| place::locate(text, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_means_working_defaults() {
        let loaded = load(None).unwrap();
        assert_eq!(loaded.config, parse("").unwrap());
        assert_eq!(check(&loaded.config, Standing { keys: 0 }), Vec::<String>::new());
    }
}
