//! Instruction set of the kernels: the best one supported, or the one set in `ARRIERO_ISA`.
//!
//! Results are bit-identical for any number of threads on one instruction set, and in f32 across all sets listed here,
//! since all have a fused multiply-add with a single rounding.

use std::sync::OnceLock;

use crate::error::{Error, Result, did_you_mean};

/// The variable that forces an instruction set, for tests and comparisons.
pub const VARIABLE: &str = "ARRIERO_ISA";

/// Instruction sets with dedicated kernels, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, as compiled.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, VL, BW and DQ.
    Avx512,
    /// AVX-512 with products of bf16 pairs.
    Avx512Bf16,
}

impl Isa {
    /// All of them, weakest first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// Its name in `ARRIERO_ISA` and in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this processor supports it.
    pub fn is_supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma");
            let avx512 =
                avx2 && has!("avx512f") && has!("avx512vl") && has!("avx512bw") && has!("avx512dq");
            match self {
                Self::Portable => true,
                Self::Avx2 => avx2,
                Self::Avx512 => avx512,
                Self::Avx512Bf16 => avx512 && has!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }

    /// The strongest supported one.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_supported()).unwrap_or(Self::Portable)
    }

    /// The one used by this process, decided once.
    pub fn current() -> Self {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| Self::from_env().unwrap_or_else(|_| Self::best()))
    }

    /// The one set in the environment, otherwise the best supported.
    ///
    /// # Errors
    /// An unknown name, or an unsupported instruction set.
    pub fn from_env() -> Result<Self> {
        match std::env::var(VARIABLE) {
            Ok(name) if !name.is_empty() => Self::named(&name),
            _ => Ok(Self::best()),
        }
    }

    fn named(name: &str) -> Result<Self> {
        let names = Self::ALL.map(Self::name);
        let Some(isa) = Self::ALL.into_iter().find(|isa| isa.name() == name) else {
            let error = Error::usage(format!("{VARIABLE} is `{name}`, expected one of {names:?}"));
            return Err(match did_you_mean(name, names) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error,
            });
        };
        if isa.is_supported() {
            return Ok(isa);
        }
        Err(Error::usage(format!("{VARIABLE} is `{name}`, which this processor lacks"))
            .hint(format!("the strongest that it has is `{}`", Self::best().name())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn isa_names_round_trip_and_typos_get_a_hint() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            assert_eq!(Isa::named(isa.name()).unwrap(), isa);
        }
        assert!(Isa::Portable.is_supported() && Isa::best().is_supported());
        let error = Isa::named("axv2").unwrap_err();
        assert_eq!(error.hint_text(), Some("did you mean `avx2`?"));
    }
}
