//! AdamW (Loshchilov and Hutter, 2019, algorithm 2) with exportable state.
//!
//! Candle's own keeps its moments private, in the parameter's type, and builds some fifteen temporaries a parameter.

use std::collections::BTreeMap;

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor, Var};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::model::gradients::Gradients;
use crate::ops::cpu;

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
}

#[derive(Debug)]
struct Moments {
    first: Tensor,
    second: Tensor,
}

/// Whether a parameter is decayed: matrices are, norm weights and biases are not (Hugging Face's grouping).
pub fn is_decayed(name: &str) -> bool {
    name.rsplit('.').next() != Some("bias") && !name.contains("norm")
}

impl AdamW {
    /// Fresh state: moments are zero.
    pub fn new(hyper: Hyper) -> Self {
        Self { hyper, steps: 0, moments: BTreeMap::new() }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Updates every parameter that has a gradient. `grad_scale` multiplies the gradients first (clipping).
    pub fn step(
        &mut self,
        params: &BTreeMap<String, Var>,
        grads: &Gradients,
        lr: f64,
        grad_scale: f64,
    ) -> Result<()> {
        self.steps += 1;
        for (name, grad) in grads.iter() {
            let param = params
                .get(name)
                .ok_or_else(|| Error::run("a gradient without a parameter").at(name))?;
            if !self.moments.contains_key(name) {
                let zeros = || param.as_tensor().detach().zeros_like();
                self.moments.insert(name.to_owned(), Moments { first: zeros()?, second: zeros()? });
            }
            let update = self.update(name, lr, grad_scale);
            let Some(moments) = self.moments.get_mut(name) else { continue };
            if param.device().is_cpu() {
                update.on_cpu(param, grad, moments)?;
            } else {
                update.plain(param, grad, moments)?;
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

/// One parameter's update, all constants folded.
#[derive(Clone, Copy)]
struct Update {
    beta1: f32,
    beta2: f32,
    grad_scale: f32,
    shrink: f32,
    step_size: f32,
    root_correction: f32,
    eps: f32,
}

impl Update {
    fn on_cpu(self, param: &Var, grad: &Tensor, moments: &Moments) -> Result<()> {
        moments.first.inplace_op2(
            grad,
            &Blend { decay: self.beta1, scale: self.grad_scale, square: false },
        )?;
        moments.second.inplace_op2(
            grad,
            &Blend { decay: self.beta2, scale: self.grad_scale, square: true },
        )?;
        param.as_tensor().inplace_op3(&moments.first, &moments.second, &Apply(self))?;
        Ok(())
    }

    fn plain(self, param: &Var, grad: &Tensor, moments: &mut Moments) -> Result<()> {
        let grad = (grad * f64::from(self.grad_scale))?;
        moments.first =
            ((&moments.first * f64::from(self.beta1))? + (&grad * f64::from(1.0 - self.beta1))?)?;
        moments.second = ((&moments.second * f64::from(self.beta2))?
            + (grad.sqr()? * f64::from(1.0 - self.beta2))?)?;
        let root =
            ((moments.second.sqrt()? / f64::from(self.root_correction))? + f64::from(self.eps))?;
        let kept = (param.as_tensor().detach() * f64::from(self.shrink))?;
        param.set(&(kept - ((&moments.first / root)? * f64::from(self.step_size))?)?)?;
        Ok(())
    }
}

/// `m = decay · m + (1 − decay) · g` or with `g²`.
struct Blend {
    decay: f32,
    scale: f32,
    square: bool,
}

impl InplaceOp2 for Blend {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(
        &self,
        moment: &mut CpuStorage,
        moment_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<()> {
        let grad = cpu::slice(grad, grad_layout)?;
        let moment = cpu::slice_mut(moment, moment_layout)?;
        moment.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK)).for_each(|(moment, grad)| {
            for (moment, grad) in moment.iter_mut().zip(grad) {
                let grad = grad * self.scale;
                let value = if self.square { grad * grad } else { grad };
                *moment = self.decay * *moment + (1.0 - self.decay) * value;
            }
        });
        Ok(())
    }
}

struct Apply(Update);

impl candle_core::InplaceOp3 for Apply {
    fn name(&self) -> &'static str {
        "adamw-apply"
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        param_layout: &Layout,
        first: &CpuStorage,
        first_layout: &Layout,
        second: &CpuStorage,
        second_layout: &Layout,
    ) -> candle_core::Result<()> {
        let Update { shrink, step_size, root_correction, eps, .. } = self.0;
        let (first, second) =
            (cpu::slice(first, first_layout)?, cpu::slice(second, second_layout)?);
        let param = cpu::slice_mut(param, param_layout)?;
        param
            .par_chunks_mut(CHUNK)
            .zip(first.par_chunks(CHUNK).zip(second.par_chunks(CHUNK)))
            .for_each(|(param, (first, second))| {
                for ((param, first), second) in param.iter_mut().zip(first).zip(second) {
                    *param = *param * shrink
                        - step_size * first / (second.sqrt() / root_correction + eps);
                }
            });
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
        let params = BTreeMap::from([("w.weight".to_owned(), Var::from_tensor(&start).unwrap())]);
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
        let ours = params["w.weight"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (ours, expected) in ours.iter().zip(&expected) {
            assert!((f64::from(*ours) - expected).abs() < 1e-6, "{ours} {expected}");
        }
    }

    #[test]
    fn the_plain_form_agrees_and_state_survives_export() {
        let start = random(7, (3, 5));
        let (ours, plain) = (Var::from_tensor(&start).unwrap(), Var::from_tensor(&start).unwrap());
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
        assert!(distance(&ours, &plain) < 1e-6);
    }
}
