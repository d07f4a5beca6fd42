//! AdamW (Loshchilov and Hutter, 2019, algorithm 2) with exportable state.
//!
//! Candle's own keeps its moments private, in the parameter's type, and builds some fifteen temporaries a parameter.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::Param;
use crate::error::{Error, Result};
use crate::model::gradients::Gradients;
use crate::ops::cpu::{self, adamw::Update};
#[cfg(feature = "cuda")]
use crate::ops::cuda::launch::host::Pipe;
#[cfg(feature = "cuda")]
use crate::ops::cuda::launch::optimizer::{self, Factor};

const CHUNK: usize = 1 << 16;

/// Constants of the update.
#[derive(Clone, Copy, Debug)]
pub struct Hyper {
    /// First-moment decay.
    pub beta1: f64,
    /// Second-moment decay.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of the decayed group.
    pub weight_decay: f64,
    /// Which parameters are decayed, by name: usually [`is_decayed`].
    pub decayed: fn(&str) -> bool,
}

/// The optimizer's state: both moments of each trained parameter, and the number of steps taken.
#[derive(Debug)]
pub struct AdamW {
    hyper: Hyper,
    steps: u64,
    moments: BTreeMap<String, Moments>,
    /// Between a GPU and masters in host memory.
    #[cfg(feature = "cuda")]
    pipe: Option<Pipe>,
}

#[derive(Debug)]
struct Moments {
    first: Tensor,
    second: Tensor,
}

impl Moments {
    /// A parameter's elements in host memory, and those of its moments.
    fn with<R>(&self, param: &Param, act: impl FnOnce([&mut [f32]; 3]) -> Result<R>) -> Result<R> {
        cpu::with_slice_mut(&param.master, |param| {
            cpu::with_slice_mut(&self.first, |first| {
                cpu::with_slice_mut(&self.second, |second| act([param, first, second]))
            })
        })???
    }
}

/// Whether a parameter is decayed: matrices are, norm weights and biases are not (Hugging Face's grouping).
pub fn is_decayed(name: &str) -> bool {
    name.rsplit('.').next() != Some("bias") && !name.contains("norm")
}

impl AdamW {
    /// Fresh state: moments are zero.
    pub fn new(hyper: Hyper) -> Self {
        Self {
            hyper,
            steps: 0,
            moments: BTreeMap::new(),
            #[cfg(feature = "cuda")]
            pipe: None,
        }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Updates every parameter that has a gradient. `grad_scale` multiplies the gradients first (clipping).
    pub fn step(
        &mut self,
        params: &BTreeMap<String, Param>,
        grads: &Gradients,
        lr: f64,
        grad_scale: f64,
    ) -> Result<()> {
        self.begin_step();
        grads.iter().try_for_each(|(name, grad)| self.apply(params, (name, grad), lr, grad_scale))
    }

    /// Begins a step whose parameters are updated one by one.
    pub fn begin_step(&mut self) {
        self.steps += 1;
    }

    /// Updates one parameter in the step that was begun.
    ///
    /// # Errors
    /// Names a gradient without a parameter.
    pub fn apply(
        &mut self,
        params: &BTreeMap<String, Param>,
        (name, grad): (&str, &Tensor),
        lr: f64,
        grad_scale: f64,
    ) -> Result<()> {
        let param = find(params, name)?;
        let update = self.update(name, lr * param.lr_scale, grad_scale);
        if param.offloaded {
            return self.apply_on_host((name, param), grad, update);
        }
        let moments = self.moments_of(name, param)?;
        if param.master.device().is_cpu() {
            return update.on_cpu(param, grad, moments);
        }
        #[cfg(feature = "cuda")]
        if param.master.device().is_cuda() {
            return update.on_cuda(param, grad, moments, None);
        }
        update.plain(param, grad, moments)
    }

    /// As [`apply`](Self::apply) on CUDA, with a factor of the gradient that is on the device: where it is NaN, nothing
    /// moves.
    ///
    /// # Errors
    /// Names a gradient without a parameter.
    #[cfg(feature = "cuda")]
    pub(crate) fn apply_clipped(
        &mut self,
        params: &BTreeMap<String, Param>,
        (name, grad): (&str, &Tensor),
        lr: f64,
        clip: &Factor,
    ) -> Result<()> {
        let param = find(params, name)?;
        let update = self.update(name, lr * param.lr_scale, 1.0);
        update.on_cuda(param, grad, self.moments_of(name, param)?, Some(clip))
    }

    /// Updates a master that is in host memory and sends its copy back to the model.
    fn apply_on_host(
        &mut self,
        (name, param): (&str, &Param),
        grad: &Tensor,
        update: Step,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let mut pipe = match self.pipe.take() {
                Some(pipe) => pipe,
                None => Pipe::new(grad.device())?,
            };
            let done = update.streamed(param, grad, self.moments_of(name, param)?, &mut pipe);
            self.pipe = Some(pipe);
            return done;
        }
        update.on_host(param, grad, self.moments_of(name, param)?)
    }

    fn moments_of(&mut self, name: &str, param: &Param) -> Result<&mut Moments> {
        match self.moments.entry(name.to_owned()) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let zeros = || param.master.as_tensor().detach().zeros_like();
                Ok(entry.insert(Moments { first: zeros()?, second: zeros()? }))
            }
        }
    }

    fn update(&self, name: &str, lr: f64, grad_scale: f64) -> Step {
        let Hyper { beta1, beta2, eps, weight_decay, decayed } = self.hyper;
        let steps = self.steps as i32;
        let decay = if decayed(name) { weight_decay } else { 0.0 };
        Step(Update {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            grad_scale: grad_scale as f32,
            shrink: (1.0 - lr * decay) as f32,
            step_size: (lr / (1.0 - beta1.powi(steps))) as f32,
            root_correction: (1.0 - beta2.powi(steps)).sqrt() as f32,
            eps: eps as f32,
        })
    }

    /// Both moments of every parameter, named `<parameter>.exp_avg` and `<parameter>.exp_avg_sq` as in PyTorch.
    pub fn export(&self) -> BTreeMap<String, Tensor> {
        self.moments
            .iter()
            .flat_map(|(name, moments)| {
                [
                    (format!("{name}.exp_avg"), moments.first.clone()),
                    (format!("{name}.exp_avg_sq"), moments.second.clone()),
                ]
            })
            .collect()
    }

    /// Takes over exported moments and the step count.
    ///
    /// # Errors
    /// Names a moment without its twin.
    pub fn import(&mut self, steps: u64, mut tensors: BTreeMap<String, Tensor>) -> Result<()> {
        self.steps = steps;
        self.moments.clear();
        let names: Vec<String> = tensors
            .keys()
            .filter_map(|name| name.strip_suffix(".exp_avg").map(str::to_owned))
            .collect();
        for name in names {
            let mut take = |suffix: &str| {
                let name = format!("{name}.{suffix}");
                tensors
                    .remove(&name)
                    .ok_or_else(|| Error::run("missing from the optimizer's state").at(name))
            };
            let moments = Moments { first: take("exp_avg")?, second: take("exp_avg_sq")? };
            self.moments.insert(name, moments);
        }
        Ok(())
    }
}

fn find<'a>(params: &'a BTreeMap<String, Param>, name: &str) -> Result<&'a Param> {
    params.get(name).ok_or_else(|| Error::run("a gradient without a parameter").at(name))
}

/// One parameter's update.
struct Step(Update);

impl Step {
    /// One pass over the master, its moments and, where there is one, its bf16 copy.
    fn on_cpu(self, param: &Param, grad: &Tensor, moments: &Moments) -> Result<()> {
        match &param.copy {
            Some(copy) => {
                cpu::with_slice_mut(copy, |copy| self.with_copy(param, copy, grad, moments))?
            }
            None => self.with_copy(param, &mut [], grad, moments),
        }
    }

    fn with_copy(
        &self,
        param: &Param,
        copy: &mut [bf16],
        grad: &Tensor,
        moments: &Moments,
    ) -> Result<()> {
        moments
            .with(param, |states| Ok(cpu::with_slice(grad, |grad| self.piece(states, grad, copy))?))
    }

    /// A piece of a master with its moments, and of its bf16 copy where that is not empty.
    fn piece(&self, [param, first, second]: [&mut [f32]; 3], grad: &[f32], copy: &mut [bf16]) {
        let mut copies: Vec<&mut [bf16]> = copy.chunks_mut(CHUNK).collect();
        copies.resize_with(param.len().div_ceil(CHUNK), Default::default);
        param
            .par_chunks_mut(CHUNK)
            .zip(first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK)))
            .zip(grad.par_chunks(CHUNK).zip(copies))
            .for_each(|((param, (first, second)), (grad, copy))| {
                cpu::adamw::update(param, [first, second], grad, copy, self.0);
            });
    }

    /// The same where the model is elsewhere: the gradient comes, the copy goes.
    fn on_host(self, param: &Param, grad: &Tensor, moments: &Moments) -> Result<()> {
        let grad = grad.to_device(&Device::Cpu)?.contiguous()?;
        if param.computed().dtype() == DType::F32 {
            self.with_copy(param, &mut [], &grad, moments)?;
            return param.send(&param.master);
        }
        let copy = Tensor::zeros(param.master.shape(), DType::BF16, &Device::Cpu)?;
        cpu::with_slice_mut(&copy, |copy| self.with_copy(param, copy, &grad, moments))??;
        param.send(&copy)
    }

    /// The same of a model on a GPU, a piece after the other: one is computed while the next comes and the last goes.
    #[cfg(feature = "cuda")]
    fn streamed(
        self,
        param: &Param,
        grad: &Tensor,
        moments: &Moments,
        pipe: &mut Pipe,
    ) -> Result<()> {
        let copy = param.computed();
        moments.with(param, |[master, first, second]| {
            if copy.dtype() == DType::F32 {
                return Ok(pipe.pass::<f32>(grad, copy, |range, grad, out| {
                    let states = [&mut *master, first, second].map(|all| &mut all[range.clone()]);
                    self.piece(states, grad, &mut []);
                    out.copy_from_slice(&master[range]);
                })?);
            }
            Ok(pipe.pass::<bf16>(grad, copy, |range, grad, out| {
                let states = [&mut *master, first, second].map(|all| &mut all[range.clone()]);
                self.piece(states, grad, out);
            })?)
        })
    }

    /// The same on a GPU, without waiting for it.
    #[cfg(feature = "cuda")]
    fn on_cuda(
        self,
        param: &Param,
        grad: &Tensor,
        moments: &Moments,
        clip: Option<&Factor>,
    ) -> Result<()> {
        let parameter = optimizer::Parameter {
            master: param.master.as_tensor(),
            copy: param.copy.as_ref().map(candle_core::Var::as_tensor),
            moments: [&moments.first, &moments.second],
            grad,
        };
        Ok(optimizer::adamw(&parameter, self.0, clip)?)
    }

    fn plain(self, param: &Param, grad: &Tensor, moments: &mut Moments) -> Result<()> {
        let Update { beta1, beta2, grad_scale, shrink, step_size, root_correction, eps } = self.0;
        let grad = (grad * f64::from(grad_scale))?;
        moments.first = ((&moments.first * f64::from(beta1))? + (&grad * f64::from(1.0 - beta1))?)?;
        moments.second =
            ((&moments.second * f64::from(beta2))? + (grad.sqr()? * f64::from(1.0 - beta2))?)?;
        let root = ((moments.second.sqrt()? / f64::from(root_correction))? + f64::from(eps))?;
        let kept = (param.master.as_tensor().detach() * f64::from(shrink))?;
        param.set(&(kept - ((&moments.first / root)? * f64::from(step_size))?)?)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::tests::{distance, random};

    const HYPER: Hyper =
        Hyper { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decayed: is_decayed };

    fn grads(index: u64) -> Gradients {
        let mut grads = Gradients::new(&candle_core::Device::Cpu);
        grads.add("w.weight", random(index, (3, 5))).unwrap();
        grads
    }

    /// Three steps against the definition in f64.
    #[test]
    fn steps_follow_the_definition() {
        let start = random(7, (3, 5));
        let params = BTreeMap::from([("w.weight".to_owned(), Param::new(&start).unwrap())]);
        let mut adamw = AdamW::new(HYPER);
        let mut expected: Vec<f64> = start
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .map(|&x| x.into())
            .collect();
        let (mut m, mut v) = (vec![0.0; 15], vec![0.0; 15]);
        for step in 1..=3_u64 {
            adamw.step(&params, &grads(step), 0.01, 0.5).unwrap();
            let grad = random(step, 15).to_vec1::<f32>().unwrap();
            for i in 0..15 {
                let g = 0.5 * f64::from(grad[i]);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let (m_hat, v_hat) = (
                    m[i] / (1.0 - 0.9_f64.powi(step as i32)),
                    v[i] / (1.0 - 0.95_f64.powi(step as i32)),
                );
                expected[i] -= 0.01 * 0.1 * expected[i] + 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
            }
        }
        let ours = params["w.weight"].master.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (ours, expected) in ours.iter().zip(&expected) {
            assert!((f64::from(*ours) - expected).abs() < 1e-6, "{ours} {expected}");
        }
    }

    #[test]
    fn the_plain_form_agrees_and_state_survives_export() {
        let start = random(7, (3, 5));
        let (ours, plain) = (Param::new(&start).unwrap(), Param::new(&start).unwrap());
        let params = BTreeMap::from([("w.weight".to_owned(), ours.clone())]);
        let mut adamw = AdamW::new(HYPER);
        let zeros = start.zeros_like().unwrap();
        let mut moments = Moments { first: zeros.clone(), second: zeros };
        for step in 1..=3 {
            let mut next = AdamW::new(HYPER);
            next.import(adamw.steps(), adamw.export()).unwrap();
            adamw = next;
            adamw.step(&params, &grads(step), 0.01, 1.0).unwrap();
            let update = adamw.update("w.weight", 0.01, 1.0);
            update.plain(&plain, grads(step).get("w.weight").unwrap(), &mut moments).unwrap();
        }
        assert!(distance(&ours.master, &plain.master) < 1e-6);
    }
}
