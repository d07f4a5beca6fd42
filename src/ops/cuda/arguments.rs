//! Checks a kernel's launch arguments against the parameters declared in its PTX.
//!
//! The driver gets addresses of arguments but neither their number nor their sizes: with one missing, a kernel reads
//! whatever is in memory behind them. Every launch goes through [`Launch`], which refuses instead.

#![expect(unsafe_code, reason = "arguments are handed to the driver")]

use std::collections::BTreeMap;
use std::fmt::{Display, Formatter};
use std::sync::Arc;

use candle_core::cuda_backend::CudaError;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, CudaViewMut, DriverError, LaunchArgs, LaunchConfig, PushKernelArg,
};
use candle_core::{Result, bail};

/// Type of a kernel parameter. Addresses are 64-bit numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parameter {
    U32,
    U64,
    F32,
    F64,
    /// A struct of this many bytes.
    Bytes(usize),
}

impl Parameter {
    /// Parses a declaration such as `.param .align 4 .b8 adamw_f32_param_7[28]`.
    fn of(declaration: &str) -> Option<Self> {
        let mut words = declaration.split_whitespace();
        match words
            .by_ref()
            .find(|word| word.starts_with('.') && !matches!(*word, ".param" | ".align"))?
        {
            ".u32" | ".s32" | ".b32" => Some(Self::U32),
            ".u64" | ".s64" | ".b64" => Some(Self::U64),
            ".f32" => Some(Self::F32),
            ".f64" => Some(Self::F64),
            ".b8" => {
                let (_, size) = words.last()?.strip_suffix(']')?.split_once('[')?;
                size.parse().ok().map(Self::Bytes)
            }
            _ => None,
        }
    }
}

impl Display for Parameter {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::U32 => f.write_str("u32"),
            Self::U64 => f.write_str("u64 or an address"),
            Self::F32 => f.write_str("f32"),
            Self::F64 => f.write_str("f64"),
            Self::Bytes(size) => write!(f, "{size} bytes"),
        }
    }
}

/// The parameters of each entry in a PTX file.
pub(super) type Entries = BTreeMap<String, Arc<[Parameter]>>;

/// Parses them.
///
/// # Errors
/// A declaration other than those generated for our kernels' types.
pub(super) fn entries(ptx: &str) -> Result<Entries> {
    let mut entries = Entries::new();
    for entry in ptx.split(".entry ").skip(1) {
        let Some((name, rest)) = entry.split_once('(') else {
            bail!("a PTX ends in an entry's name")
        };
        let list = rest.split(')').next().unwrap_or_default();
        let declarations = list.split(',').map(str::trim).filter(|one| !one.is_empty());
        let parameters: Option<Arc<[Parameter]>> = declarations.map(Parameter::of).collect();
        let Some(parameters) = parameters else {
            bail!("kernel `{name}` takes what no launch can give: {list}")
        };
        entries.insert(name.trim().to_owned(), parameters);
    }
    Ok(entries)
}

/// A possible argument.
pub(super) trait Argument {
    /// Its type in the kernel.
    const IS: Parameter;
}

macro_rules! arguments {
    ($($number:ty => $is:ident),*) => {
        $(impl Argument for &$number {
            const IS: Parameter = Parameter::$is;
        })*
    };
}
arguments!(u32 => U32, u64 => U64, f32 => F32, f64 => F64);

impl<T, const N: usize> Argument for &[T; N] {
    const IS: Parameter = Parameter::Bytes(size_of::<[T; N]>());
}

impl<T> Argument for &CudaSlice<T> {
    const IS: Parameter = Parameter::U64;
}

impl<T> Argument for &mut CudaSlice<T> {
    const IS: Parameter = Parameter::U64;
}

impl<T> Argument for &CudaView<'_, T> {
    const IS: Parameter = Parameter::U64;
}

impl<T> Argument for &mut CudaViewMut<'_, T> {
    const IS: Parameter = Parameter::U64;
}

/// A launch in preparation.
pub(super) struct Launch<'a> {
    kernel: &'a str,
    wanted: &'a [Parameter],
    given: Vec<Parameter>,
    arguments: LaunchArgs<'a>,
}

// SAFETY: each argument is handed on as it is.
unsafe impl<'a, T: Argument> PushKernelArg<T> for Launch<'a>
where
    LaunchArgs<'a>: PushKernelArg<T>,
{
    fn arg(&mut self, argument: T) -> &mut Self {
        self.given.push(T::IS);
        self.arguments.arg(argument);
        self
    }
}

impl<'a> Launch<'a> {
    /// A launch of a kernel with the parameters `wanted`.
    pub(super) fn new(kernel: &'a str, wanted: &'a [Parameter], arguments: LaunchArgs<'a>) -> Self {
        Self { kernel, wanted, given: Vec::with_capacity(wanted.len()), arguments }
    }

    /// Enqueues it on the stream.
    ///
    /// # Safety
    /// Addresses must point to memory as large as the kernel expects, which is not used otherwise while it runs.
    ///
    /// # Errors
    /// Arguments of another number or other types than the kernel's; a driver error.
    pub(super) unsafe fn launch(
        &mut self,
        config: LaunchConfig,
    ) -> std::result::Result<(), Refused> {
        if let Some(wrong) = wrong(self.wanted, &self.given) {
            return Err(Refused::Arguments(format!("kernel `{}`: {wrong}", self.kernel)));
        }
        // SAFETY: the caller's, and the arguments are of the kernel's types.
        unsafe { self.arguments.launch(config) }.map_err(Refused::Driver)?;
        Ok(())
    }
}

/// Reason a launch was refused.
#[derive(Debug)]
pub(super) enum Refused {
    /// The arguments do not match the kernel.
    Arguments(String),
    Driver(DriverError),
}

impl From<Refused> for CudaError {
    fn from(refused: Refused) -> Self {
        match refused {
            // Candle's errors have room for no other text; such a launch ends the run.
            Refused::Arguments(text) => Self::InternalError(text.leak()),
            Refused::Driver(error) => Self::Cuda(error),
        }
    }
}

/// The mismatch between arguments and parameters, if any.
fn wrong(wanted: &[Parameter], given: &[Parameter]) -> Option<String> {
    if wanted.len() != given.len() {
        return Some(format!("{} arguments, expected {}", given.len(), wanted.len()));
    }
    let place = wanted.iter().zip(given).position(|(wanted, given)| wanted != given)?;
    Some(format!("argument {place} is {}, expected {}", given[place], wanted[place]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "
.visible .entry scale_f32(
	.param .u64 scale_f32_param_0,
	.param .u64 .ptr .align 1 scale_f32_param_1,
	.param .f32 scale_f32_param_2,
	.param .align 4 .b8 scale_f32_param_3[28],
	.param .f64 scale_f32_param_4,
	.param .u32 scale_f32_param_5
)
.maxntid 1024, 1, 1
{
	ret;
}
.visible .entry none()
{
}
";

    #[test]
    fn ptx_entry_parameters_are_parsed() {
        use Parameter::{Bytes, F32, F64, U32, U64};
        let entries = entries(PTX).unwrap();
        assert_eq!(entries["scale_f32"].as_ref(), [U64, U64, F32, Bytes(28), F64, U32]);
        assert_eq!(entries["none"].as_ref(), []);
        assert_eq!(entries.len(), 2);
        let error = super::entries(&PTX.replace(".f64", ".texref")).unwrap_err().to_string();
        assert!(error.contains("`scale_f32` takes what no launch can give"), "{error}");
    }

    #[test]
    fn mismatched_arguments_are_described() {
        use Parameter::{F32, U32, U64};
        assert_eq!(wrong(&[U64, U32], &[U64, U32]), None);
        assert_eq!(wrong(&[U64, U32], &[U64]).unwrap(), "1 arguments, expected 2");
        let text = wrong(&[U64, U32, F32], &[U64, U64, F32]).unwrap();
        assert_eq!(text, "argument 1 is u64 or an address, expected u32");
        let error = CudaError::from(Refused::Arguments(text)).to_string();
        assert!(error.contains("argument 1 is"), "{error}");
    }

    #[test]
    fn arguments_map_to_kernel_parameters() {
        assert_eq!(<&[f32; 7] as Argument>::IS, Parameter::Bytes(28));
        assert_eq!(<&CudaSlice<f64> as Argument>::IS, Parameter::U64);
        assert_eq!(<&f64 as Argument>::IS, Parameter::F64);
    }
}
