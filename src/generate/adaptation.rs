//! Adapters applied beside the base model's matrices during generation: several adapters share one base and can be
//! added and removed independently.
//!
//! Nothing is merged: `y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ` row by row, as in training, so log-probabilities match the trainer's bit
//! for bit. One forward pass can hold rows of several adapters.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::parts::Layer;
use crate::error::{Error, Result};
use crate::model::lora::peft::Saved;
use crate::model::lora::{Adapter, check_fit};
use crate::model::matrix::Matrix;
use crate::model::{Architecture, Tensors, Weights};
use crate::ops::cpu::Element;

/// The projections of a transformer block, in forward-pass order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Place {
    const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    fn module(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// One projection's adapter, and DoRA's scale of its outputs.
#[derive(Clone, Debug)]
struct Beside {
    adapter: Adapter,
    factors: Option<Vec<f32>>,
}

/// The adapters of all of a model's projections.
#[derive(Clone, Debug)]
pub struct Adaptation {
    layers: Vec<[Option<Beside>; Place::ALL.len()]>,
}

impl Adaptation {
    /// Wraps adapters read from files, converted to `dtype`. `weights`: the base's.
    ///
    /// # Errors
    /// An adapter of another base or of a reward model, or one with fully trained parameters.
    pub(super) fn new(
        saved: &Saved,
        weights: &Weights,
        layers: usize,
        dtype: DType,
    ) -> Result<Self> {
        if saved.config.architecture() != Architecture::CausalLm {
            return Err(Error::usage("an adapter that makes a reward model cannot write text"));
        }
        if let Some(name) = saved.weights.keys().next() {
            return Err(Error::usage(format!("`{name}` was fully trained with the adapter")).hint(
                "`arriero merge` makes a model of base and adapter, which can be used alone",
            ));
        }
        check_fit(&Tensors::dense(weights.clone()), &saved.adapters)?;
        let beside = |layer: usize, place: Place| -> Result<Option<Beside>> {
            let module = format!("model.layers.{layer}.{}", place.module());
            let Some(adapter) = saved.adapters.get(&module) else { return Ok(None) };
            let weight = weights.get(&format!("{module}.weight"));
            let weight =
                weight.ok_or_else(|| Error::run("missing from the weights").at(&module))?;
            Ok(Some(Beside::new(adapter, &weight.to_dtype(dtype)?, dtype)?))
        };
        let layer = |layer: usize| -> Result<[Option<Beside>; Place::ALL.len()]> {
            let mut all = [const { None }; Place::ALL.len()];
            for place in Place::ALL {
                all[place as usize] = beside(layer, place)?;
            }
            Ok(all)
        };
        Ok(Self { layers: (0..layers).map(layer).collect::<Result<_>>()? })
    }

    fn at(&self, layer: usize, place: Place) -> Option<&Beside> {
        self.layers.get(layer)?.get(place as usize)?.as_ref()
    }
}

impl Beside {
    fn new(adapter: &Adapter, weight: &Tensor, dtype: DType) -> Result<Self> {
        let weight = Matrix::Dense(weight.clone());
        let adapter = adapter.clone().beside(&weight, dtype)?;
        let on_cpu = adapter.a.device().is_cpu();
        let factors = match dtype {
            _ if !on_cpu => None,
            DType::BF16 => adapter.factors::<half::bf16>(&weight)?,
            _ => adapter.factors::<f32>(&weight)?,
        };
        Ok(Self { adapter, factors })
    }
}

/// Rows of a forward pass, in runs that share an adapter.
#[derive(Debug, Default)]
pub(super) struct Adapted<'a> {
    runs: Vec<(Range<usize>, &'a Adaptation)>,
}

impl<'a> Adapted<'a> {
    /// Appends the next rows. Neighbouring rows with the same adapter form one run.
    pub(super) fn push(&mut self, rows: Range<usize>, adaptation: Option<&'a Adaptation>) {
        let Some(adaptation) = adaptation else { return };
        match self.runs.last_mut() {
            Some((run, last)) if std::ptr::eq(*last, adaptation) && run.end == rows.start => {
                run.end = rows.end;
            }
            _ => self.runs.push((rows, adaptation)),
        }
    }

    /// Adds the adapters' outputs for a projection's inputs `x` `[M, I]` to its products `y` `[M, O]`.
    ///
    /// # Errors
    /// Adapters of another dtype.
    pub(super) fn add<E: Element>(
        &self,
        (layer, place): (usize, Place),
        x: &[E],
        y: &mut [f32],
    ) -> Result<()> {
        for (run, adaptation) in &self.runs {
            let Some(Beside { adapter, factors }) = adaptation.at(layer, place) else { continue };
            let (outer, inner) = (adapter.b.dims()[0], adapter.a.dims()[1]);
            let x = &x[run.start * inner..run.end * inner];
            adapter.add(x, &mut y[run.start * outer..run.end * outer], factors.as_deref())?;
        }
        Ok(())
    }

    /// As [`add`](Self::add), on tensors and any device.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn graph(
        &self,
        (index, place): (usize, Place),
        layer: &Layer,
        x: &Tensor,
        y: Tensor,
    ) -> Result<Tensor> {
        let mut y = y;
        for (run, adaptation) in &self.runs {
            let Some(Beside { adapter, .. }) = adaptation.at(index, place) else { continue };
            let weight = layer.matrix(place).dense()?;
            let [own_x, own_y] = [x, &y].map(|rows| rows.narrow(0, run.start, run.len()));
            let beside = (&Matrix::Dense(weight.clone()), weight.dtype());
            let added = adapter.graph((&own_x?, None), &own_y?, beside)?;
            let rest = y.dim(0)? - run.end;
            let (before, after) = (y.narrow(0, 0, run.start)?, y.narrow(0, run.end, rest)?);
            let parts = [before, added, after];
            let parts: Vec<&Tensor> = parts.iter().filter(|part| part.dims()[0] > 0).collect();
            y = Tensor::cat(&parts, 0)?;
        }
        Ok(y)
    }
}
