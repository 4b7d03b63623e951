//! Reads GPU prices from a dated file of the user's, or takes the small public list that comes along.

use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use ledger::gpu_price::{GpuPrice, GpuPriceList};

use crate::config;

/// The list that comes along.
const PUBLIC: &str = include_str!("public.toml");

/// The prices of a file, or the public ones.
///
/// # Errors
/// One line that names file, line and key.
pub fn load(file: Option<&Path>) -> anyhow::Result<GpuPriceList> {
    let Some(file) = file else { return parse(PUBLIC).map_err(|mistake| anyhow!("public prices:{mistake}")) };
    let shown = file.display();
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {shown}"))?;
    let list = parse(&text).map_err(|mistake| anyhow!("{shown}:{mistake}"))?;
    if list.prices.is_empty() {
        bail!("{shown} holds no price; begin each with the line `[[price]]`");
    }
    Ok(list)
}

/// The one price that is meant.
///
/// # Errors
/// When there is none or more than one, naming those that there are.
pub fn choose<'a>(list: &'a GpuPriceList, gpu: &'a str, provider: Option<&'a str>) -> anyhow::Result<&'a GpuPrice> {
    let found: Vec<&GpuPrice> = list.of(gpu, provider).collect();
    match found[..] {
        [one] => Ok(one),
        [] => {
            let mut known: Vec<&str> = list.prices.iter().map(|price| price.gpu.as_str()).collect();
            known.sort_unstable();
            known.dedup();
            let from = provider.map_or(String::new(), |provider| format!(" of {provider}"));
            bail!("no price is known for the GPU `{gpu}`{from}; give --gpu-hour-usd, or one of {}", known.join(", "))
        }
        _ => {
            let named: Vec<String> = found
                .iter()
                .map(|price| format!("{} ({} a GPU)", price.name(), price.each(price.on_demand_usd)))
                .collect();
            bail!(
                "several prices are known for the GPU `{gpu}`; choose one with --provider or give --gpu-hour-usd: {}",
                named.join(", ")
            )
        }
    }
}

fn parse(text: &str) -> Result<GpuPriceList, String> {
    let list: GpuPriceList = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start).min(text.len());
        let line = 1 + text[..at].matches('\n').count();
        format!("{line}: {}", in_words(&error.message().lines().collect::<Vec<_>>().join("; ")))
    })?;
    match list.mistake() {
        Some(mistake) => Err(format!(" {mistake}")),
        None => Ok(list),
    }
}

/// An unknown key with the one that was meant.
fn in_words(message: &str) -> String {
    let unknown = message.strip_prefix("unknown field `").and_then(|rest| rest.split_once('`'));
    let Some((wrong, expected)) = unknown else { return message.to_owned() };
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    match config::nearest(wrong, known.iter().copied()) {
        Some(near) => format!("unknown key `{wrong}`; did you mean `{near}`?"),
        None => format!("unknown key `{wrong}`; known keys are {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_public_price_has_a_day_and_a_source() {
        let list = load(None).unwrap();
        assert!(list.prices.len() >= 10);
        for price in &list.prices {
            assert!(price.source.contains("https://"), "{}", price.name());
            assert!(ledger::gpu::GpuSheet::named(&price.gpu).is_some(), "{} is in no data sheet", price.gpu);
            let dearer = price.commitments.iter().filter(|one| one.usd >= price.on_demand_usd).count();
            assert_eq!(dearer, 0, "{}", price.name());
        }
    }

    #[test]
    fn one_price_is_chosen_or_all_are_named() {
        let list = load(None).unwrap();
        let price = choose(&list, "h100", Some("aws")).unwrap();
        assert_eq!(price.each(price.on_demand_usd).to_string(), "6.88");
        let several = choose(&list, "H100", None).unwrap_err().to_string();
        assert!(
            several.contains("aws p5.48xlarge in us-east-1 (6.88 a GPU)") && several.contains("--provider"),
            "{several}"
        );
        let none = choose(&list, "Z1", None).unwrap_err().to_string();
        assert!(none.contains("A100") && none.contains("--gpu-hour-usd"), "{none}");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let good = "[[price]]\ngpu = \"H100\"\nprovider = \"own\"\nproduct = \"rack\"\non_demand_usd = \"2.5\"\nread_on = \"2026-11-01\"\nsource = \"invoice\"\n";
        assert_eq!(parse(good).unwrap().prices[0].gpus, 1);
        let cases = [
            (
                good.replace("on_demand_usd", "on_demand_us"),
                "6: unknown key `on_demand_us`; did you mean `on_demand_usd`?",
            ),
            (good.replace("2.5", "two"), "5: "),
            (good.replace("2026-11-01", "November"), "write a day"),
        ];
        for (text, part) in cases {
            let mistake = parse(&text).unwrap_err();
            assert!(mistake.contains(part.trim_start_matches("6: ")) && !mistake.contains('\n'), "{mistake}");
        }
    }
}
