//! Numbers: exact fractions while they fit, floating point beyond.

/// A value. Fractions are in lowest terms with a positive denominator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Number {
    Exact(i128, i128),
    Real(f64),
}

use Number::{Exact, Real};

/// Largest exponent computed exactly.
const EXPONENT: u128 = 64;

fn gcd(a: i128, b: i128) -> i128 {
    let (mut a, mut b) = (a.unsigned_abs(), b.unsigned_abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    // At most the larger of two values that fit, except for the minimum integer.
    i128::try_from(a).unwrap_or(1)
}

impl Number {
    pub(super) fn whole(value: i128) -> Self {
        Exact(value, 1)
    }

    /// A fraction; `None` if not representable.
    fn fraction(above: i128, below: i128) -> Option<Self> {
        if below == 0 {
            return None;
        }
        let common = gcd(above, below).max(1);
        let (above, below) = (above / common, below / common);
        if below < 0 {
            Some(Exact(above.checked_neg()?, below.checked_neg()?))
        } else {
            Some(Exact(above, below))
        }
    }

    pub(super) fn real(self) -> f64 {
        match self {
            Exact(above, below) => above as f64 / below as f64,
            Real(value) => value,
        }
    }

    /// The exact result if both operands are exact and it fits, otherwise in floating point; `None` if not finite.
    fn either(
        self,
        other: Self,
        exact: impl Fn(i128, i128, i128, i128) -> Option<Self>,
        real: impl Fn(f64, f64) -> f64,
    ) -> Option<Self> {
        if let (Exact(a, b), Exact(c, d)) = (self, other)
            && let Some(result) = exact(a, b, c, d)
        {
            return Some(result);
        }
        finite(real(self.real(), other.real()))
    }

    pub(super) fn add(self, other: Self) -> Option<Self> {
        let exact = |a: i128, b: i128, c: i128, d: i128| {
            Self::fraction(a.checked_mul(d)?.checked_add(c.checked_mul(b)?)?, b.checked_mul(d)?)
        };
        self.either(other, exact, |x, y| x + y)
    }

    pub(super) fn neg(self) -> Option<Self> {
        Self::whole(-1).mul(self)
    }

    pub(super) fn mul(self, other: Self) -> Option<Self> {
        let exact = |a: i128, b: i128, c: i128, d: i128| {
            Self::fraction(a.checked_mul(c)?, b.checked_mul(d)?)
        };
        self.either(other, exact, |x, y| x * y)
    }

    /// `None` for division by zero.
    pub(super) fn div(self, other: Self) -> Option<Self> {
        if let Exact(0, _) = other {
            return None;
        }
        let exact = |a: i128, b: i128, c: i128, d: i128| {
            Self::fraction(a.checked_mul(d)?, b.checked_mul(c)?)
        };
        self.either(other, exact, |x, y| x / y)
    }

    /// `None` if not a real number.
    pub(super) fn pow(self, exponent: Self) -> Option<Self> {
        if let (Exact(..), Exact(power, 1)) = (self, exponent)
            && power.unsigned_abs() <= EXPONENT
        {
            let base = if power < 0 { Self::whole(1).div(self)? } else { self };
            let powered =
                (0..power.unsigned_abs()).try_fold(Self::whole(1), |product, _| product.mul(base));
            if let Some(Exact(..)) = powered {
                return powered;
            }
        }
        finite(self.real().powf(exponent.real()))
    }

    pub(super) fn map(self, function: impl Fn(f64) -> f64) -> Option<Self> {
        finite(function(self.real()))
    }

    /// A decimal literal: digits and at most one point.
    pub(super) fn decimal(digits: &str) -> Option<Self> {
        let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
        let exact = || {
            let above: i128 = format!("{whole}{part}").parse().ok()?;
            Self::fraction(above, 10_i128.checked_pow(u32::try_from(part.len()).ok()?)?)
        };
        exact().or_else(|| finite(digits.parse().ok()?))
    }

    /// Equality: exact if both are exact, otherwise up to rounding.
    pub(super) fn same(self, other: Self) -> bool {
        match (self, other) {
            (Exact(a, b), Exact(c, d)) => (a, b) == (c, d),
            _ => close(self.real(), other.real()),
        }
    }
}

fn finite(value: f64) -> Option<Number> {
    value.is_finite().then_some(Real(value))
}

/// Equal up to the rounding of a few dozen operations.
pub(super) fn close(x: f64, y: f64) -> bool {
    (x - y).abs() <= 1e-9 * x.abs().max(y.abs()).max(1e-3)
}
