//! An op with inputs, compared between a device and the CPU for every memory layout of the inputs.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::check::{Checked, checked, home, numbers};
use crate::ops::residual;

pub(super) type Op = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// An op with its inputs. Tensors that follow the device and the type are passed in; the rest is captured by the
/// function.
pub(super) struct Case {
    pub(super) op: String,
    pub(super) inputs: Vec<(&'static str, Tensor)>,
    pub(super) run: Op,
    /// Types supported on the device.
    pub(super) types: &'static [DType],
}

/// Inputs of up to this many elements are tested in every layout.
const SMALL: usize = 1 << 13;

/// Memory layout of an op's inputs.
#[derive(Clone, Copy)]
pub(super) enum Lie {
    Whole,
    /// First and last dimension swapped, so that there are gaps.
    Turned,
    /// A view into a larger tensor, from an odd offset.
    Within,
}

impl Lie {
    fn name(self) -> &'static str {
        match self {
            Self::Whole => "",
            Self::Turned => ", turned",
            Self::Within => ", within",
        }
    }

    fn of(self, x: &Tensor) -> Result<Tensor> {
        let last = x.rank() - 1;
        match self {
            Self::Whole => Ok(x.clone()),
            Self::Turned => x.transpose(0, last)?.contiguous()?.transpose(0, last),
            Self::Within => {
                let flat = x.flatten_all()?;
                let more = Tensor::cat(&[&flat.narrow(0, 0, 1)?.detach(), &flat], 0)?;
                more.narrow(0, 1, flat.elem_count())?.reshape(x.shape())
            }
        }
    }
}

impl Case {
    /// Compares every result in every type with the CPU's; for small inputs, in every memory layout.
    pub(super) fn check(&self, device: &Device) -> Result<Vec<Checked>> {
        let expected = self.results((&Device::Cpu, DType::F32), Lie::Whole)?;
        let small = self.inputs.iter().all(|(_, x)| x.elem_count() <= SMALL);
        let lies: &[Lie] =
            if small { &[Lie::Whole, Lie::Turned, Lie::Within] } else { &[Lie::Whole] };
        let mut all = Vec::new();
        for (&dtype, &lie) in
            self.types.iter().flat_map(|dtype| lies.iter().map(move |lie| (dtype, lie)))
        {
            let found = self.results((device, dtype), lie)?;
            for ((what, expected), (_, found)) in expected.iter().zip(&found) {
                let op = format!("{}{}", self.op, lie.name());
                all.push(checked((&op, what), dtype, (expected, found))?);
            }
        }
        all.extend(self.mixed(device)?);
        Ok(all)
    }

    /// Leaves the last input on the CPU, which every op has to refuse.
    fn mixed(&self, device: &Device) -> Result<Option<Checked>> {
        let Some(((_, last), rest)) = self.inputs.split_last() else { return Ok(None) };
        if rest.is_empty() || device.is_cpu() {
            return Ok(None);
        }
        let moved = rest.iter().map(|(_, x)| x.to_device(device));
        let mut given = moved.collect::<Result<Vec<Tensor>>>()?;
        given.push(last.clone());
        let error = if (self.run)(&given).is_err() { 0.0 } else { f64::NAN };
        let (op, what) = (self.op.clone(), "refuses a mix of devices".to_owned());
        Ok(Some(Checked { op, dtype: "f32", what, error, bound: 0.0 }))
    }

    /// The output and the gradient of each input, as f32 on the CPU.
    pub(super) fn results(
        &self,
        (device, dtype): (&Device, DType),
        lie: Lie,
    ) -> Result<Vec<(String, Tensor)>> {
        let moved = |x: &Tensor| x.to_device(device)?.to_dtype(dtype);
        let vars = self.inputs.iter().map(|(_, x)| Var::from_tensor(&moved(x)?));
        let vars: Vec<Var> = vars.collect::<Result<_>>()?;
        let given = vars.iter().map(|var| lie.of(var.as_tensor()));
        let out = (self.run)(&given.collect::<Result<Vec<_>>>()?)?;
        let d_out = moved(&numbers(11, out.shape())?)?;
        // The root's value is meaningless: its gradient is `d_out`.
        let grads = residual::vjp_root(&out, &d_out)?.backward()?;
        let mut results = vec![("forward".to_owned(), home(&out)?)];
        for ((name, _), var) in self.inputs.iter().zip(&vars) {
            let Some(grad) = grads.get(var.as_tensor()) else {
                candle_core::bail!("{}: no gradient of {name}", self.op);
            };
            results.push((format!("d_{name}"), home(grad)?));
        }
        Ok(results)
    }
}
