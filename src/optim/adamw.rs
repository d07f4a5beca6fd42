//! AdamW (Loshchilov and Hutter, 2019, algorithm 2) with exportable state.
//!
//! Candle's own keeps its moments private and in the parameter's dtype, and allocates some fifteen temporaries per
//! parameter.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Bound;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::Param;
use crate::error::{Error, Result};
use crate::model::gradients::Gradients;
use crate::ops::cpu;
use crate::ops::cpu::adamw::{Chance, Update, round_by_chance, update};
#[cfg(feature = "cuda")]
use crate::ops::cuda::launch::host::Pipe;
#[cfg(feature = "cuda")]
use crate::ops::cuda::launch::optimizer::{self, Factor};

const CHUNK: usize = 1 << 16;

/// Hyperparameters of the update.
#[derive(Clone, Copy, Debug)]
pub struct Hyper {
    /// First-moment decay.
    pub beta1: f64,
    /// Second-moment decay.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, applied to the decayed group.
    pub weight_decay: f64,
    /// Which parameters are decayed, by name; usually [`is_decayed`].
    pub decayed: fn(&str) -> bool,
}

/// Optimizer state: both moments of each trained parameter, and the step count.
#[derive(Debug)]
pub struct AdamW {
    hyper: Hyper,
    steps: u64,
    moments: BTreeMap<String, Moments>,
    /// Seed of stochastic rounding of the copies, if enabled.
    seed: Option<u64>,
    /// Transfers between a GPU and masters in host memory.
    #[cfg(feature = "cuda")]
    pipe: Option<Pipe>,
}

#[derive(Debug)]
struct Moments {
    first: Tensor,
    second: Tensor,
}

impl Moments {
    /// Gives access to a parameter's elements in host memory and to its moments.
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
    /// Fresh state with zero moments.
    pub fn new(hyper: Hyper) -> Self {
        Self {
            hyper,
            steps: 0,
            moments: BTreeMap::new(),
            seed: None,
            #[cfg(feature = "cuda")]
            pipe: None,
        }
    }

    /// With a seed, bf16 copies of masters are rounded stochastically; otherwise to nearest.
    ///
    /// The random state is not saved: the rounding of an element is determined by the seed, the step number, the
    /// parameter's index among the trained ones in name order, and the element's index in it.
    #[must_use]
    pub fn rounding_by_chance(self, seed: Option<u64>) -> Self {
        Self { seed, ..self }
    }

    /// Number of steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Updates every parameter that has a gradient. `grad_scale` multiplies the gradients first (for clipping).
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

    /// Updates one parameter in the current step.
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
        let step = self.step_of(params, name, lr * param.lr_scale, grad_scale);
        if param.offloaded {
            return self.apply_on_host((name, param), grad, step);
        }
        let moments = self.moments_of(name, param)?;
        if param.master.device().is_cpu() {
            return step.on_cpu(param, grad, moments);
        }
        #[cfg(feature = "cuda")]
        if param.master.device().is_cuda() {
            return step.on_cuda(param, grad, moments, None);
        }
        step.plain(param, grad, moments)
    }

    /// As [`apply`](Self::apply) on CUDA, with a gradient scale that is on the device; if it is NaN, the parameter is
    /// unchanged.
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
        let step = self.step_of(params, name, lr * param.lr_scale, 1.0);
        step.on_cuda(param, grad, self.moments_of(name, param)?, Some(clip))
    }

    /// Updates a master in host memory and sends its copy back to the model.
    fn apply_on_host(
        &mut self,
        (name, param): (&str, &Param),
        grad: &Tensor,
        step: Step,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let mut pipe = match self.pipe.take() {
                Some(pipe) => pipe,
                None => Pipe::new(grad.device())?,
            };
            let done = step.streamed(param, grad, self.moments_of(name, param)?, &mut pipe);
            self.pipe = Some(pipe);
            return done;
        }
        step.on_host(param, grad, self.moments_of(name, param)?)
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

    fn step_of(
        &self,
        params: &BTreeMap<String, Param>,
        name: &str,
        lr: f64,
        grad_scale: f64,
    ) -> Step {
        let chance = self.chance(params, name);
        Step { update: self.update(name, lr, grad_scale), chance }
    }

    /// Random stream for a parameter's copy in this step: step number in the upper half, parameter index in the lower
    /// one. Streams never repeat, and a resumed run draws the same numbers.
    fn chance(&self, params: &BTreeMap<String, Param>, name: &str) -> Option<Chance> {
        let before = (Bound::Unbounded, Bound::Excluded(name));
        let place = || params.range::<str, _>(before).count() as u64;
        self.seed.map(|seed| Chance { seed, stream: self.steps << 32 | place() })
    }

    /// Repeats the last step's stochastic rounding for copies of masters read from a checkpoint, which stores masters
    /// only. A parameter that has moments is updated in every step.
    ///
    /// # Errors
    /// A device error.
    pub fn round_again(&self, params: &BTreeMap<String, Param>) -> Result<()> {
        for (name, param) in params.iter().filter(|(name, _)| self.moments.contains_key(*name)) {
            if let Some(chance) = self.chance(params, name) {
                send_by_chance(param, chance)?;
            }
        }
        Ok(())
    }

    fn update(&self, name: &str, lr: f64, grad_scale: f64) -> Update {
        let Hyper { beta1, beta2, eps, weight_decay, decayed } = self.hyper;
        let steps = self.steps as i32;
        let decay = if decayed(name) { weight_decay } else { 0.0 };
        Update {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            grad_scale: grad_scale as f32,
            shrink: (1.0 - lr * decay) as f32,
            step_size: (lr / (1.0 - beta1.powi(steps))) as f32,
            root_correction: (1.0 - beta2.powi(steps)).sqrt() as f32,
            eps: eps as f32,
        }
    }

    /// Bytes of moments on `device`.
    pub fn bytes(&self, device: &Device) -> u64 {
        let here = |tensor: &&Tensor| tensor.device().same_device(device);
        let all = self.moments.values().flat_map(|moments| [&moments.first, &moments.second]);
        all.filter(here)
            .map(|tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64)
            .sum()
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

    /// Imports exported moments and the step count.
    ///
    /// # Errors
    /// Names a moment without its counterpart.
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

/// Stochastically rounds a parameter's copy on the CPU and sends it to its device. No-op if it is not bf16.
fn send_by_chance(param: &Param, chance: Chance) -> Result<()> {
    if param.computed().dtype() != DType::BF16 {
        return Ok(());
    }
    let master = param.master.as_tensor().detach().to_device(&Device::Cpu)?;
    let copy = Tensor::zeros(master.shape(), DType::BF16, &Device::Cpu)?;
    cpu::with_slice_mut(&copy, |copy: &mut [bf16]| {
        cpu::with_slice(&master, |master: &[f32]| {
            let pieces = copy.par_chunks_mut(CHUNK).zip(master.par_chunks(CHUNK)).enumerate();
            pieces.for_each(|(at, (copy, master))| {
                round_by_chance(copy, master, (at * CHUNK) as u64, chance);
            });
        })
    })??;
    param.send(&copy)
}

/// One parameter's update, and its stochastic rounding if enabled.
struct Step {
    update: Update,
    chance: Option<Chance>,
}

impl Step {
    /// One pass over the master, its moments and its bf16 copy, if any.
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
        moments.with(param, |states| {
            Ok(cpu::with_slice(grad, |grad| self.piece(0, states, grad, copy))?)
        })
    }

    /// A chunk of a master with its moments, and of its bf16 copy if not empty, starting at element `begin`.
    fn piece(
        &self,
        begin: usize,
        [param, first, second]: [&mut [f32]; 3],
        grad: &[f32],
        copy: &mut [bf16],
    ) {
        let mut copies: Vec<&mut [bf16]> = copy.chunks_mut(CHUNK).collect();
        copies.resize_with(param.len().div_ceil(CHUNK), Default::default);
        param
            .par_chunks_mut(CHUNK)
            .zip(first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK)))
            .zip(grad.par_chunks(CHUNK).zip(copies))
            .enumerate()
            .for_each(|(at, ((param, (first, second)), (grad, copy)))| match self.chance {
                Some(chance) if !copy.is_empty() => {
                    update(param, [first, second], grad, &mut [], self.update);
                    // The values just written are still in the core's cache.
                    round_by_chance(copy, param, (begin + at * CHUNK) as u64, chance);
                }
                _ => update(param, [first, second], grad, copy, self.update),
            });
    }

    /// As [`on_cpu`](Self::on_cpu), for a model elsewhere: receives the gradient, sends the copy.
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

    /// As [`on_host`](Self::on_host), for a model on a GPU, pipelined in pieces: receive, compute and send overlap.
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
                    self.piece(range.start, states, grad, &mut []);
                    out.copy_from_slice(&master[range]);
                })?);
            }
            Ok(pipe.pass::<bf16>(grad, copy, |range, grad, out| {
                let states = [&mut *master, first, second].map(|all| &mut all[range.clone()]);
                self.piece(range.start, states, grad, out);
            })?)
        })
    }

    /// The update on a GPU, asynchronously.
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
            chance: self.chance,
        };
        Ok(optimizer::adamw(&parameter, self.update, clip)?)
    }

    fn plain(self, param: &Param, grad: &Tensor, moments: &mut Moments) -> Result<()> {
        let Update { beta1, beta2, grad_scale, shrink, step_size, root_correction, eps } =
            self.update;
        let grad = (grad * f64::from(grad_scale))?;
        moments.first = ((&moments.first * f64::from(beta1))? + (&grad * f64::from(1.0 - beta1))?)?;
        moments.second =
            ((&moments.second * f64::from(beta2))? + (grad.sqr()? * f64::from(1.0 - beta2))?)?;
        let root = ((moments.second.sqrt()? / f64::from(root_correction))? + f64::from(eps))?;
        let kept = (param.master.as_tensor().detach() * f64::from(shrink))?;
        param.set(&(kept - ((&moments.first / root)? * f64::from(step_size))?)?)?;
        self.chance.map_or(Ok(()), |chance| send_by_chance(param, chance))
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
        grads.add("w.weight", &random(index, (3, 5))).unwrap();
        grads
    }

    /// Three steps match the definition computed in f64.
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
            let own = adamw.step_of(&params, "w.weight", 0.01, 1.0);
            own.plain(&plain, grads(step).get("w.weight").unwrap(), &mut moments).unwrap();
        }
        assert!(distance(&ours.master, &plain.master) < 1e-6);
    }

    /// Larger than the chunks that threads share, and not a multiple of a counter's four elements.
    const LONG: usize = 3 * CHUNK + 7;
    const SIZES: [(&str, usize); 3] = [("a.weight", 5), ("b.weight", LONG), ("c.weight", 5)];

    fn parameters(dtype: DType, offloaded: bool) -> BTreeMap<String, Param> {
        let param = |(index, (name, count)): (usize, &(&str, usize))| {
            let param = Param::computed_in(&random(index as u64, *count), dtype).unwrap();
            (name.to_string(), if offloaded { param.offloaded().unwrap() } else { param })
        };
        SIZES.iter().enumerate().map(param).collect()
    }

    /// Gradients that give parameters using all 24 bits of the mantissa.
    fn step(adamw: &mut AdamW, params: &BTreeMap<String, Param>, seed: u64) {
        let mut grads = Gradients::new(&Device::Cpu);
        for (index, (name, count)) in SIZES.iter().enumerate() {
            grads.add(name, &random(10 * seed + index as u64, *count)).unwrap();
        }
        adamw.step(params, &grads, 0.01, 0.5).unwrap();
    }

    fn masters(params: &BTreeMap<String, Param>) -> Vec<Vec<u32>> {
        let values = params.values().map(|param| param.master.to_vec1::<f32>().unwrap());
        values.map(|values| values.into_iter().map(f32::to_bits).collect()).collect()
    }

    fn copies(params: &BTreeMap<String, Param>) -> Vec<Vec<u16>> {
        let values = params.values().map(|param| param.computed().to_vec1::<bf16>().unwrap());
        values.map(|values| values.into_iter().map(bf16::to_bits).collect()).collect()
    }

    /// The documented scheme: Philox of (element / 4, index, step) under the seed; one word per element, whose upper
    /// half is added to the value's bits.
    fn by_hand(params: &BTreeMap<String, Param>, seed: u64, steps: u32) -> Vec<Vec<u16>> {
        let copy = |(place, values): (usize, Vec<u32>)| {
            let round = |(i, bits): (usize, u32)| {
                let counter = [(i / 4) as u32, 0, place as u32, steps].map(|word| [word]);
                let [word] = crate::rng::philox(counter, [seed as u32, (seed >> 32) as u32])[i % 4];
                ((bits + (word >> 16)) >> 16) as u16
            };
            values.into_iter().enumerate().map(round).collect()
        };
        masters(params).into_iter().enumerate().map(copy).collect()
    }

    const SEED: u64 = 0x0005_1234_8765_4321;

    #[test]
    fn copies_are_rounded_by_words_of_step_place_and_element() {
        for offloaded in [false, true] {
            let (params, plain) =
                (parameters(DType::BF16, offloaded), parameters(DType::BF16, false));
            let mut adamw = AdamW::new(HYPER).rounding_by_chance(Some(SEED));
            let mut nearest = AdamW::new(HYPER).rounding_by_chance(None);
            for steps in 1..=3 {
                step(&mut adamw, &params, steps.into());
                step(&mut nearest, &plain, steps.into());
                assert!(
                    copies(&params) == by_hand(&params, SEED, steps),
                    "{offloaded}, step {steps}"
                );
                // The same gradients move masters identically, whatever the rounding of copies.
                assert!(masters(&params) == masters(&plain));
                for param in plain.values() {
                    let rounded = param.master.to_dtype(DType::BF16).unwrap();
                    let rounded = rounded.to_vec1::<bf16>().unwrap();
                    assert!(rounded == param.computed().to_vec1::<bf16>().unwrap());
                }
                assert!(copies(&params) != copies(&plain));
            }
        }
    }

    #[test]
    fn plain_form_draws_the_same_random_words() {
        let params = parameters(DType::BF16, false);
        let mut adamw = AdamW::new(HYPER).rounding_by_chance(Some(SEED));
        adamw.begin_step();
        for (index, (name, param)) in params.iter().enumerate() {
            let zeros = param.master.zeros_like().unwrap();
            let mut moments = Moments { first: zeros.clone(), second: zeros };
            let step = adamw.step_of(&params, name, 0.01, 1.0);
            let grad = random(index as u64 + 20, param.master.shape());
            step.plain(param, &grad, &mut moments).unwrap();
        }
        assert!(copies(&params) == by_hand(&params, SEED, 1));
    }

    /// Files store masters; a parameter's copy is rounded to nearest when read.
    #[test]
    fn copies_of_loaded_masters_match_those_of_the_last_step() {
        for offloaded in [false, true] {
            let params = parameters(DType::BF16, false);
            let mut adamw = AdamW::new(HYPER).rounding_by_chance(Some(SEED));
            (1..=2).for_each(|seed| step(&mut adamw, &params, seed));
            let read = parameters(DType::BF16, offloaded);
            let mut next = AdamW::new(HYPER).rounding_by_chance(Some(SEED));
            next.import(adamw.steps(), adamw.export()).unwrap();
            for (name, param) in &read {
                param.set(&params[name].master.copy().unwrap()).unwrap();
            }
            assert!(copies(&read) != copies(&params));
            next.round_again(&read).unwrap();
            assert!(copies(&read) == copies(&params), "{offloaded}");
            // Without a seed copies are unchanged.
            let mut nearest = AdamW::new(HYPER);
            nearest.import(adamw.steps(), adamw.export()).unwrap();
            nearest.round_again(&params).unwrap();
            assert!(copies(&read) == copies(&params));
        }
    }

    #[test]
    fn f32_is_not_rounded() {
        for offloaded in [false, true] {
            let [params, plain] = [(); 2].map(|()| parameters(DType::F32, offloaded));
            let mut adamw = AdamW::new(HYPER).rounding_by_chance(Some(SEED));
            step(&mut adamw, &params, 1);
            step(&mut AdamW::new(HYPER), &plain, 1);
            adamw.round_again(&params).unwrap();
            for (params, plain) in params.values().zip(plain.values()) {
                let bits = |tensor: &Tensor| -> Vec<u32> {
                    tensor.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
                };
                assert!(bits(params.computed()) == bits(plain.computed()));
            }
        }
    }
}
