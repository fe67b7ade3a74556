//! What if: a model that is not there, or that costs another price.

use std::collections::{BTreeMap, BTreeSet};

use super::{log::Entry, matrix::Matrix};
use crate::domain::{Fleet, ModelCard};

/// What is other than it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WhatIf {
    /// Models that cannot be called.
    pub without: BTreeSet<String>,
    /// Factors on what models cost.
    pub cost: BTreeMap<String, f64>,
}

impl WhatIf {
    /// From names, and from `MODEL=FACTOR` each.
    ///
    /// # Errors
    /// When a factor is none.
    pub fn of(without: &[String], cost: &[String]) -> Result<Self, String> {
        let factor = |text: &String| {
            let (model, factor) = text
                .rsplit_once('=')
                .and_then(|(m, f)| Some((m, f.parse::<f64>().ok()?)))
                .ok_or_else(|| format!("`{text}`: a model and a factor on its cost are given, e.g. large=0.5"))?;
            match factor.is_finite() && factor >= 0.0 {
                true => Ok((model.to_owned(), factor)),
                false => Err(format!("`{text}`: the factor is a number from 0 on")),
            }
        };
        Ok(Self {
            without: without.iter().cloned().collect(),
            cost: cost.iter().map(factor).collect::<Result<_, _>>()?,
        })
    }

    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// The models that it speaks of.
    pub fn models(&self) -> impl Iterator<Item = &String> {
        self.without.iter().chain(self.cost.keys())
    }

    /// For people, a line each.
    pub fn told(&self) -> Vec<String> {
        let without = self.without.iter().map(|m| format!("{m} is not there"));
        without.chain(self.cost.iter().map(|(m, f)| format!("{m} costs {f} times as much"))).collect()
    }

    fn factor(&self, model: &str) -> f64 {
        self.cost.get(model).copied().unwrap_or(1.0)
    }

    /// The fleet at these prices.
    pub fn fleet(&self, fleet: &Fleet) -> Fleet {
        Fleet::new(fleet.0.values().cloned().map(|mut card: ModelCard| {
            let factor = self.factor(&card.name);
            card.price.input *= factor;
            card.price.output *= factor;
            card.price.cached_input = card.price.cached_input.map(|p| p * factor);
            card
        }))
    }

    /// The outcomes at these costs.
    pub fn outcomes(&self, matrix: &mut Matrix) {
        let factors: Vec<f64> = matrix.models.iter().map(|m| self.factor(m)).collect();
        matrix.scale_costs(&factors);
    }

    /// A logged decision as it would have been seen.
    pub fn entry(&self, entry: &mut Entry) {
        if let Some(observed) = &mut entry.observed {
            observed.cost_usd *= self.factor(&entry.served_by);
        }
        if let Ok(context) = &mut entry.context {
            for (name, state) in &mut context.fleet {
                state.available &= !self.without.contains(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_numbers_from_zero_on() {
        let texts = |of: &[&str]| of.iter().map(|t| (*t).to_owned()).collect::<Vec<String>>();
        let what_if = WhatIf::of(&texts(&["gone"]), &texts(&["a=b=0.5", "c=2"])).unwrap();
        assert_eq!(what_if.told(), ["gone is not there", "a=b costs 0.5 times as much", "c costs 2 times as much"]);
        for bad in ["a", "a=", "a=x", "a=-1", "a=inf"] {
            assert!(WhatIf::of(&[], &texts(&[bad])).is_err(), "{bad}");
        }
        assert!(WhatIf::default().is_nothing());
    }
}
