//! A moving reference, evaluated anew for every micro-batch.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::Summing;
use crate::data::forest::Forest;
use crate::error::Result;
use crate::loss::of_rows;

type Ask = dyn Fn(&Forest) -> Result<Vec<f32>> + Send + Sync;

/// Source of a moving reference's log-probabilities for a forest's targets.
#[derive(Clone)]
pub struct LiveReference(Arc<Ask>);

impl LiveReference {
    /// Wraps `ask`, which returns one log-probability per target.
    pub fn new(ask: impl Fn(&Forest) -> Result<Vec<f32>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }

    /// Log-probability of each leaf by row: from `live` for this forest if set, otherwise from `kept`.
    pub(super) fn table<'a>(
        live: Option<&Self>,
        kept: &'a BTreeMap<usize, Vec<f64>>,
        (summing, forest): (Summing, &Forest),
    ) -> Result<Cow<'a, BTreeMap<usize, Vec<f64>>>> {
        match live {
            Some(Self(ask)) => Ok(Cow::Owned(summing.table(forest, &ask(forest)?))),
            None => Ok(Cow::Borrowed(kept)),
        }
    }

    /// As `table`, restricted to this forest's rows and owned.
    pub(super) fn for_forest(
        live: Option<&Self>,
        kept: &BTreeMap<usize, Vec<f64>>,
        (summing, forest): (Summing, &Forest),
    ) -> Result<BTreeMap<usize, Vec<f64>>> {
        match Self::table(live, kept, (summing, forest))? {
            Cow::Owned(table) => Ok(table),
            Cow::Borrowed(table) => Ok(of_rows(table, forest)),
        }
    }
}

impl fmt::Debug for LiveReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LiveReference")
    }
}
