//! `farthing key …`: virtual keys. A key is shown once; the ledger keeps its keyed hash.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use gateway::keys::{KeyRecord, PlainKey, mint};
use ledger::{ContextField, KeyId, Label, Timestamp};
use serde::Serialize;

use super::{App, author};
use crate::cli::{KeyCommand, KeyCreate, parse_span};
use crate::config::nearest;
use crate::governance::{Governance, hashing_secret, put_key, random};
use crate::render::{self, Align, Table};
use crate::{books, clock};

/// Makes, lists, withdraws or replaces keys. A running server sees the change within a second.
///
/// # Errors
/// When an option is wrong, a key is unknown, or the control log cannot be written.
pub async fn run(app: &App, command: &KeyCommand) -> anyhow::Result<ExitCode> {
    match command {
        KeyCommand::Create(options) => create(app, options).await?,
        KeyCommand::List => list(app).await?,
        KeyCommand::Revoke { id } => revoke(app, id).await?,
        KeyCommand::Rotate { id, overlap } => rotate(app, id, *overlap).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(app: &App, options: &KeyCreate) -> anyhow::Result<()> {
    let now = clock::now();
    let data = app.global.data_dir();
    // Every option is read before anything is made, so that a mistake leaves nothing behind.
    let draft = draft(options, now)?;
    let control = books::control_or_new(&data, &app.load()?).await?;
    let (plain, record) = minted(&data, now, draft)?;
    put_key(&control, &record, &author(), now).await?;
    show_once(app, &plain, &record)
}

/// A record with everything but its id and hash.
fn draft(options: &KeyCreate, now: Timestamp) -> anyhow::Result<impl FnOnce(KeyRecord) -> KeyRecord> {
    let label = |name: &str, text: &str| -> anyhow::Result<Label> {
        let text = text.trim();
        if text.is_empty() || text.len() > ledger::context::LABEL_BYTES_MAX || text.chars().any(char::is_control) {
            bail!("--{name} is empty, too long or has control characters");
        }
        Ok(text.into())
    };
    let optional = |name: &str, text: &Option<String>| text.as_deref().map(|text| label(name, text)).transpose();
    let consumer = label("consumer", &options.consumer)?;
    let team = label("team", &options.team)?;
    let application = optional("application", &options.application)?;
    let cost_centre = optional("cost-centre", &options.cost_centre)?;
    let environment = optional("environment", &options.environment)?;
    let may_set = options.may_set.iter().map(|name| context_field(name)).collect::<anyhow::Result<Vec<_>>>()?;
    let models = options.models.iter().map(|model| label("models", model)).collect::<anyhow::Result<Vec<_>>>()?;
    let networks = options.networks.iter().map(|network| network.parse().map_err(anyhow::Error::msg));
    let networks = networks.collect::<anyhow::Result<Vec<_>>>()?;
    let expires_at = options.expires.as_deref().map(|when| expiry(when, now)).transpose()?;
    Ok(move |record| KeyRecord {
        consumer: Some(consumer),
        team: Some(team),
        application,
        cost_centre,
        environment,
        may_set,
        models,
        networks,
        expires_at,
        ..record
    })
}

/// A dimension by its name, with a hint when there is none of that name.
///
/// # Errors
/// One sentence for people.
pub fn context_field(name: &str) -> anyhow::Result<ContextField> {
    let names = ContextField::ALL.map(ContextField::name);
    ContextField::ALL.into_iter().find(|field| field.name() == name.trim()).with_context(|| {
        let hint = nearest(name, names)
            .map_or(format!("known are {}", names.join(", ")), |near| format!("did you mean `{near}`?"));
        format!("--may-set: `{name}` is not a dimension that a header can carry; {hint}")
    })
}

fn expiry(when: &str, now: Timestamp) -> anyhow::Result<Timestamp> {
    let at = match parse_span(when) {
        Ok(micros) => now.plus_micros(micros),
        Err(_) => when.parse().map_err(|error| anyhow::anyhow!("--expires: {error}, or a span such as 90d"))?,
    };
    if at <= now {
        bail!("--expires: {at} has passed already");
    }
    Ok(at)
}

/// A new key of this draft.
///
/// # Errors
/// When the installation's secret or random bytes cannot be had.
pub fn minted(
    data: &std::path::Path,
    now: Timestamp,
    draft: impl FnOnce(KeyRecord) -> KeyRecord,
) -> anyhow::Result<(PlainKey, KeyRecord)> {
    let (plain, hash) = mint(random()?, &hashing_secret(data)?);
    Ok((plain, draft(KeyRecord::new(KeyId::new(now, random()?), hash))))
}

fn show_once(app: &App, plain: &PlainKey, record: &KeyRecord) -> anyhow::Result<()> {
    if app.global.json {
        let mut document = serde_json::to_value(Listed::of(record, clock::now()))?;
        document["key"] = plain.reveal().into();
        return render::say_json(&document);
    }
    let who = record.consumer.as_deref().unwrap_or("nobody");
    crate::complain(&format!("key {} for {who}; it is shown only now:", record.id));
    Ok(render::say(plain.reveal())?)
}

/// A key as it may be shown: everything but its hash.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub struct Listed {
    /// The key's public id.
    pub id: String,
    /// `valid`, `expired`, `revoked` or `not yet valid`.
    pub state: &'static str,
    /// Who holds it.
    pub consumer: Option<String>,
    /// The team that pays.
    pub team: Option<String>,
    /// The application.
    pub application: Option<String>,
    /// Where finance books it.
    pub cost_centre: Option<String>,
    /// The environment.
    pub environment: Option<String>,
    /// Dimensions that its holder may set.
    pub may_set: Vec<&'static str>,
    /// Models it may ask for; empty means all.
    pub models: Vec<String>,
    /// Networks it may be used from; empty means all.
    pub networks: Vec<String>,
    /// When it was made, RFC 3339.
    pub created_at: String,
    /// When it stops working, RFC 3339.
    pub expires_at: Option<String>,
    /// When it was withdrawn, RFC 3339.
    pub revoked_at: Option<String>,
}

impl Listed {
    /// How the key stands at `now`.
    #[must_use]
    pub fn of(record: &KeyRecord, now: Timestamp) -> Listed {
        let state = match record {
            KeyRecord { revoked_at: Some(at), .. } if *at <= now => "revoked",
            KeyRecord { expires_at: Some(at), .. } if *at <= now => "expired",
            KeyRecord { not_before: Some(at), .. } if now < *at => "not yet valid",
            _ => "valid",
        };
        let text = |label: &Option<Label>| label.as_deref().map(str::to_owned);
        Listed {
            id: record.id.to_string(),
            state,
            consumer: text(&record.consumer),
            team: text(&record.team),
            application: text(&record.application),
            cost_centre: text(&record.cost_centre),
            environment: text(&record.environment),
            may_set: record.may_set.iter().map(|field| field.name()).collect(),
            models: record.models.iter().map(|model| model.to_string()).collect(),
            networks: record.networks.iter().map(|&network| String::from(network)).collect(),
            created_at: record.id.at().to_string(),
            expires_at: record.expires_at.map(|at| at.to_string()),
            revoked_at: record.revoked_at.map(|at| at.to_string()),
        }
    }
}

async fn list(app: &App) -> anyhow::Result<()> {
    let store = books::read(&app.global.data_dir()).await?;
    let governance = Governance::load(&store.control()).await?;
    let now = clock::now();
    let keys: Vec<Listed> = governance.keys.values().map(|key| Listed::of(key, now)).collect();
    if app.global.json {
        return render::say_json(&keys);
    }
    let mut table = Table::new(
        ["id", "state", "consumer", "team", "application", "may set", "models", "expires"]
            .map(|name| (name, Align::Left)),
    );
    for key in keys {
        let text = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
        let models = if key.models.is_empty() { "all".to_owned() } else { key.models.join(",") };
        table.row([
            key.id,
            key.state.to_owned(),
            text(key.consumer),
            text(key.team),
            text(key.application),
            key.may_set.join(","),
            models,
            text(key.expires_at),
        ]);
    }
    Ok(render::say(&table.to_string())?)
}

async fn revoke(app: &App, id: &str) -> anyhow::Result<()> {
    let now = clock::now();
    let control = books::control(&app.global.data_dir()).await?;
    let mut record = Governance::load(&control).await?.key(id)?.clone();
    if record.revoked_at.is_some_and(|at| at <= now) {
        bail!("key {} is revoked already", record.id);
    }
    record.revoked_at = Some(now);
    put_key(&control, &record, &author(), now).await?;
    if app.global.json {
        return render::say_json(&Listed::of(&record, now));
    }
    Ok(render::say(&format!("key {} is revoked", record.id))?)
}

async fn rotate(app: &App, id: &str, overlap: i64) -> anyhow::Result<()> {
    let now = clock::now();
    let data = app.global.data_dir();
    let control = books::control(&data).await?;
    let old = Governance::load(&control).await?.key(id)?.clone();
    if !old.is_valid_at(now) {
        bail!("key {} is not valid now; make a new one with `farthing key create`", old.id);
    }
    let (plain, new) = minted(&data, now, |fresh| KeyRecord { id: fresh.id, hash: fresh.hash, ..old.clone() })?;
    // The new key first: if the second write fails, the holder has two keys rather than none.
    put_key(&control, &new, &author(), now).await?;
    let end = now.plus_micros(overlap);
    let old = KeyRecord { expires_at: Some(old.expires_at.map_or(end, |before| before.min(end))), ..old };
    put_key(&control, &old, &author(), now).await?;
    if !app.global.json {
        crate::complain(&format!("key {} works until {}", old.id, old.expires_at.unwrap_or(end)));
    }
    show_once(app, &plain, &new)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_expiries_are_checked() {
        assert_eq!(context_field("task").unwrap(), ContextField::Task);
        assert!(context_field("tsak").unwrap_err().to_string().contains("did you mean `task`?"));
        let now = Timestamp::from_micros(1_000_000_000_000_000);
        assert_eq!(expiry("1h", now).unwrap(), now.plus_micros(3_600_000_000));
        assert!(expiry("2001-01-01", now).unwrap_err().to_string().contains("passed"));
        assert!(expiry("soon", now).is_err());
    }
}
