//! `farthing price …`: what models cost, public price maps, and what another map would have cost.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use futures_util::StreamExt;
use ledger::price::{Imported, PastUsage, PriceBook, RateCard, Reject, Rerating, import_litellm, rerate};
use ledger::{Money, Timestamp};
use serde_json::json;

use super::{App, author};
use crate::cli::{PriceCommand, PriceMapKind, Span};
use crate::config::{nearest, price_book};
use crate::render::{self, Align, Table};
use crate::{books, clock, governance, rows};

/// Shows, imports or compares prices.
///
/// # Errors
/// When a model is unknown, a file is no price map, or the ledger cannot be read or written.
pub async fn run(app: &App, command: &PriceCommand) -> anyhow::Result<ExitCode> {
    match command {
        PriceCommand::Show { model, provider, at } => show(app, model, provider.as_deref(), *at).await?,
        PriceCommand::Import { kind: PriceMapKind::Litellm, file } => import(app, file).await?,
        PriceCommand::Diff { file, span } => diff(app, file, *span).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn book(app: &App) -> anyhow::Result<PriceBook> {
    let loaded = app.load()?;
    let governance = books::standing(&app.global.data_dir()).await?;
    Ok(price_book(&loaded.config, governance.price_map.as_ref()))
}

async fn show(app: &App, model: &str, provider: Option<&str>, at: Option<Timestamp>) -> anyhow::Result<()> {
    let book = book(app).await?;
    let at = at.unwrap_or_else(clock::now);
    let cards: Vec<_> = match provider {
        Some(provider) => book.show(provider, model, at),
        None => {
            let models = book.models();
            let providers = models.iter().filter(|(_, name)| name == model).map(|(provider, _)| provider.as_str());
            let mut providers: Vec<&str> = providers.collect();
            // Dated names and aliases are not in the list of models; the large providers know theirs.
            providers.extend(["openai", "anthropic", "google"]);
            providers.dedup();
            let first = providers.iter().map(|provider| book.show(provider, model, at)).find(|cards| !cards.is_empty());
            let listed: Vec<_> = models
                .iter()
                .filter(|(_, name)| name == model)
                .flat_map(|(provider, _)| book.show(provider, model, at))
                .collect();
            if listed.is_empty() { first.unwrap_or_default() } else { listed }
        }
    };
    if cards.is_empty() {
        let models = book.models();
        if let Some(provider) = provider.filter(|_| models.iter().any(|(_, name)| name == model)) {
            let sellers: std::collections::BTreeSet<&str> =
                models.iter().filter(|(_, name)| name == model).map(|(seller, _)| seller.as_str()).collect();
            let sellers = sellers.into_iter().collect::<Vec<_>>().join(", ");
            bail!("no price of `{provider}` is known for model `{model}`; known are those of {sellers}");
        }
        let names = models.iter().map(|(_, name)| name.as_str()).filter(|name| *name != model);
        let hint = nearest(model, names).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
        bail!("no price is known for model `{model}`{hint}");
    }
    if app.global.json {
        return render::say_json(&json!({ "book": book.version(), "at": at, "cards": cards }));
    }
    let mut table = Table::new([
        ("provider", Align::Left),
        ("model", Align::Left),
        ("class", Align::Left),
        ("input above", Align::Right),
        ("tokens", Align::Left),
        ("USD/M", Align::Right),
        ("source", Align::Left),
    ]);
    for card in &cards {
        card_rows(&mut table, card);
    }
    Ok(render::say(&format!("{table}\nprice book {}, at {at}\n", book.version()))?)
}

fn card_rows(table: &mut Table, card: &RateCard) {
    for tier in &card.tiers {
        let above = if tier.above_input_tokens == 0 { String::new() } else { render::count(tier.above_input_tokens) };
        for (kind, price) in tier.rates.iter() {
            table.row([
                card.provider.to_string(),
                card.model.to_string(),
                card.class.name().to_owned(),
                above.clone(),
                kind.to_string(),
                price.usd_per_million(),
                card.source.to_string(),
            ]);
        }
    }
}

async fn import(app: &App, file: &Path) -> anyhow::Result<()> {
    let (imported, rejects) = read_map(file)?;
    let control = books::control_or_new(&app.global.data_dir(), &app.load()?).await?;
    let (name, cards) = (imported.name.clone(), imported.cards.len());
    control.append(governance::PRICE_MAP, serde_json::to_value(&imported)?, &author(), clock::now()).await?;
    let file_of_rejects = write_rejects(file, &rejects)?;
    if app.global.json {
        return render::say_json(&json!({
            "name": name, "cards": cards, "rejected": rejects.len(), "rejects_file": file_of_rejects
        }));
    }
    render::say(&format!(
        "price map {name}: {}; new requests are priced by it",
        render::counted(u64::try_from(cards)?, "price card")
    ))?;
    if let Some(path) = file_of_rejects {
        crate::complain(&format!(
            "farthing: {} not imported; see {}",
            render::counted(u64::try_from(rejects.len())?, "entry"),
            path.display()
        ));
    }
    Ok(())
}

fn read_map(file: &Path) -> anyhow::Result<(Imported, Vec<Reject>)> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    import_litellm(&text).with_context(|| format!("{} is not a price map of LiteLLM's", file.display()))
}

fn write_rejects(file: &Path, rejects: &[Reject]) -> anyhow::Result<Option<std::path::PathBuf>> {
    if rejects.is_empty() {
        return Ok(None);
    }
    let mut path = file.as_os_str().to_owned();
    path.push(".rejects.csv");
    let path = std::path::PathBuf::from(path);
    let mut writer = csv::Writer::from_path(&path).with_context(|| format!("cannot write {}", path.display()))?;
    writer.write_record(["model", "key", "reason"])?;
    for reject in rejects {
        writer.write_record([&reject.model, &reject.key, &reject.reason])?;
    }
    writer.flush()?;
    Ok(Some(path))
}

async fn diff(app: &App, file: &Path, span: Span) -> anyhow::Result<()> {
    let period = span.period().map_err(anyhow::Error::msg)?;
    let loaded = app.load()?;
    let (imported, _) = read_map(file)?;
    let name = imported.name.clone();
    let store = books::read(&app.global.data_dir()).await?;
    let governance = governance::Governance::load(&store.control()).await?;
    let old = price_book(&loaded.config, governance.price_map.as_ref());
    let new = price_book(&loaded.config, Some(&imported));
    let query = format!("SELECT * FROM attempts WHERE {}", rows::within("received_at", period));
    let mut batches = store.sql_stream(&query).await?;
    let mut usages = Vec::new();
    while let Some(batch) = batches.next().await {
        usages.extend(store::attempts_of(&batch?)?.iter().map(PastUsage::of));
    }
    let rerating = rerate(&usages, &old, &new);
    if app.global.json {
        return render::say_json(&document(&rerating, &old, &new));
    }
    let mut table = Table::new([
        ("provider", Align::Left),
        ("model", Align::Left),
        ("attempts", Align::Right),
        ("now USD", Align::Right),
        ("then USD", Align::Right),
        ("difference", Align::Right),
        ("unpriced now", Align::Right),
        ("unpriced then", Align::Right),
    ]);
    let amounts = rerating.models.iter().flat_map(|(_, _, of)| [of.old, of.new, of.new - of.old]);
    let places = render::places_for(amounts);
    let cells = |of: &ledger::price::Rerated| {
        // Where nothing has an amount there is none to show: unknown is not zero.
        let known = |unpriced: u64, amount: Money| match unpriced < of.attempts {
            true => render::dollars_to(amount, places),
            false => "unknown".to_owned(),
        };
        [
            render::count(of.attempts),
            known(of.old_unpriced, of.old),
            known(of.new_unpriced, of.new),
            known(of.old_unpriced.max(of.new_unpriced), of.new - of.old),
            render::count(of.old_unpriced),
            render::count(of.new_unpriced),
        ]
    };
    for (provider, model, of) in &rerating.models {
        table.row([provider.to_string(), model.to_string()].into_iter().chain(cells(of)));
    }
    table.total(["total".to_owned(), String::new()].into_iter().chain(cells(&rerating.total)));
    Ok(render::say(&format!("past usage at {} (now) and with {name} (then)\n\n{table}", old.version()))?)
}

fn document(rerating: &Rerating, old: &PriceBook, new: &PriceBook) -> serde_json::Value {
    let of = |rerated: &ledger::price::Rerated| {
        let difference: Money = rerated.new - rerated.old;
        json!({
            "attempts": rerated.attempts, "old_cost": rerated.old, "new_cost": rerated.new, "difference": difference,
            "old_unpriced": rerated.old_unpriced, "new_unpriced": rerated.new_unpriced,
        })
    };
    let models: Vec<_> = rerating
        .models
        .iter()
        .map(|(provider, model, rerated)| {
            let mut document = of(rerated);
            document["provider"] = provider.to_string().into();
            document["model"] = model.to_string().into();
            document
        })
        .collect();
    json!({ "old_book": old.version(), "new_book": new.version(), "models": models, "total": of(&rerating.total) })
}
