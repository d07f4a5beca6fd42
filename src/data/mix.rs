//! Joins several datasets: takes fractions, shuffles and splits, always the same way for the same seed.

use super::record::Row;
use crate::error::{Error, Result};
use crate::rng::Stream;

/// Which rows of a dataset are used: all of them `whole` times, plus a subset once more.
///
/// A fraction below one takes a random subset; above one, the dataset is repeated whole, plus a random subset (Llama 3,
/// section 4.1.3: good sources are seen several times, others less than once). The rows depend only on the seed, the
/// dataset's index in the list and its length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// How often all rows are used.
    pub whole: usize,
    /// Rows that are used once more, in order.
    pub part: Vec<usize>,
}

impl Share {
    /// The share of dataset `index` with `rows` rows. An integer fraction needs no subset, so `rows` is then ignored.
    ///
    /// # Errors
    /// A fraction that is negative or not a number.
    pub fn new(rows: usize, fraction: f64, index: usize, seed: u64) -> Result<Self> {
        if !fraction.is_finite() || fraction < 0.0 {
            return Err(Error::usage(format!(
                "datasets[{index}]: fraction = {fraction}, expected 0 or more"
            )));
        }
        let count = (fraction.fract() * rows as f64).round() as usize;
        let mut part = Vec::new();
        if count > 0 {
            part = Stream::new(seed, "mix/take").permutation(index as u64, rows);
            part.truncate(count);
            part.sort_unstable();
        }
        Ok(Self { whole: fraction.floor() as usize, part })
    }

    /// How often `row` is used.
    pub fn times(&self, row: usize) -> usize {
        self.whole + usize::from(self.part.binary_search(&row).is_ok())
    }
}

/// Takes a fraction of dataset `index`, in its own order (see [`Share`]).
///
/// # Errors
/// A fraction that is negative or not a number.
pub fn take(rows: &[Row], fraction: f64, index: usize, seed: u64) -> Result<Vec<Row>> {
    let Share { whole, part } = Share::new(rows.len(), fraction, index, seed)?;
    let repeated = std::iter::repeat_n(rows, whole).flatten();
    Ok(repeated.chain(part.into_iter().map(|place| &rows[place])).cloned().collect())
}

/// Takes a fraction of each dataset (see [`take`]) and shuffles all of them together.
///
/// # Errors
/// A fraction that is negative or not a number; an empty result.
pub fn mix(parts: Vec<(Vec<Row>, f64)>, seed: u64) -> Result<Vec<Row>> {
    let mut mixed = Vec::new();
    for (index, (rows, fraction)) in parts.into_iter().enumerate() {
        mixed.extend(take(&rows, fraction, index, seed)?);
    }
    if mixed.is_empty() {
        return Err(Error::run("no rows are left after mixing").hint("raise `fraction`"));
    }
    let order = Stream::new(seed, "mix/shuffle").permutation(0, mixed.len());
    Ok(order.into_iter().map(|row| mixed[row].clone()).collect())
}

/// How much to hold out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HeldOut {
    /// A share of all rows, in (0, 1).
    Fraction(f64),
    /// A number of rows.
    Count(usize),
}

/// Splits rows into a training and a held-out set, both in the original order.
///
/// # Errors
/// A split that leaves either set empty.
pub fn split(rows: Vec<Row>, held_out: HeldOut, seed: u64) -> Result<(Vec<Row>, Vec<Row>)> {
    let total = rows.len();
    let count = match held_out {
        HeldOut::Fraction(fraction) => (fraction * total as f64).round() as usize,
        HeldOut::Count(count) => count,
    };
    if count == 0 || count >= total {
        return Err(Error::usage(format!(
            "{held_out:?} of {total} rows leaves one side of the split empty"
        )));
    }
    let mut is_held_out = vec![false; total];
    for row in Stream::new(seed, "mix/split").permutation(0, total).into_iter().take(count) {
        is_held_out[row] = true;
    }
    let (mut train, mut held) = (Vec::new(), Vec::new());
    for (row, out) in rows.into_iter().zip(is_held_out) {
        if out { held.push(row) } else { train.push(row) }
    }
    Ok((train, held))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::record::Record;

    fn rows(name: &str, count: usize) -> Vec<Row> {
        (0..count)
            .map(|index| Row::new(format!("{name}:{index}"), Record::Text(String::new())))
            .collect()
    }

    fn places(rows: &[Row]) -> Vec<&str> {
        let mut places: Vec<&str> = rows.iter().map(|row| row.place.as_str()).collect();
        places.sort_unstable();
        places
    }

    #[test]
    fn fractions_repeat_or_subsample_rows() {
        let mixed = mix(vec![(rows("a", 10), 2.5), (rows("b", 10), 0.3)], 7).unwrap();
        assert_eq!(mixed.iter().filter(|row| row.place.starts_with('a')).count(), 25);
        assert_eq!(mixed.iter().filter(|row| row.place.starts_with('b')).count(), 3);
        let again = mix(vec![(rows("a", 10), 2.5), (rows("b", 10), 0.3)], 7).unwrap();
        assert_eq!(mixed, again);
        assert_ne!(mixed, mix(vec![(rows("a", 10), 2.5), (rows("b", 10), 0.3)], 8).unwrap());
        assert!(mix(vec![(rows("a", 2), -1.0)], 7).is_err());
        assert!(mix(vec![(rows("a", 2), 0.0)], 7).is_err());
    }

    #[test]
    fn split_keeps_every_row_exactly_once() {
        let (train, held) = split(rows("a", 10), HeldOut::Fraction(0.2), 1).unwrap();
        assert_eq!((train.len(), held.len()), (8, 2));
        let mut all = train.clone();
        all.extend(held);
        let whole = rows("a", 10);
        assert_eq!(places(&all), places(&whole));
        assert_eq!(split(rows("a", 10), HeldOut::Count(2), 1).unwrap().0, train);
        assert!(split(rows("a", 3), HeldOut::Count(3), 1).is_err());
    }
}
