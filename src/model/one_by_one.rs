//! Reads a model's weights one tensor at a time, for callers that store them in a smaller form: at most one full-size
//! tensor is in memory.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::checkpoint::{self, Checkpoint};
use super::gguf::Gguf;
use super::lora::load::is_adapter;
use super::lora::peft::BaseId;
use super::source::Source;
use super::tensor_file::{self, Mapped};
use super::{Config, params};
use crate::error::{Context, Result};

/// Receives a parameter's name and its values in f32.
pub(super) type Take<'a> = dyn FnMut(&str, Tensor) -> Result<()> + 'a;

/// Passes every parameter of the model, which has this configuration, to `take`. An adapter is merged into its base,
/// which requires reading all of it first; returns its fingerprints, which do not follow from the weights.
///
/// # Errors
/// As [`Checkpoint::load`].
pub(super) fn each(
    source: &Source,
    config: &Config,
    device: &Device,
    take: &mut Take<'_>,
) -> Result<Option<BaseId>> {
    match source {
        Source::Directory(dir) if is_adapter(dir) => {
            let (Checkpoint { mut weights, .. }, id) =
                Checkpoint::load_adapter_with_id(dir, device)?;
            while let Some((name, tensor)) = weights.pop_first() {
                take(&name, tensor)?;
            }
            return Ok(Some(id));
        }
        Source::Directory(dir) => of_directory(dir, config, device, take)?,
        Source::Gguf(path) => {
            let gguf = Gguf::open(path)?;
            let mut read = || -> Result<()> {
                let parameters = gguf.parameters()?;
                let shapes = parameters.iter().map(|(name, (_, shape))| (name.as_str(), *shape));
                params::check_shapes(config, shapes)?;
                for (renamed, (name, _)) in parameters {
                    let tensor = gguf.parameter(config, (&renamed, name))?;
                    take(&renamed, tensor.to_device(device)?)?;
                }
                Ok(())
            };
            read().at(path.display())?;
        }
    }
    Ok(None)
}

fn of_directory(dir: &Path, config: &Config, device: &Device, take: &mut Take<'_>) -> Result<()> {
    let tied = config.is_tied();
    let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    // A tied head stored separately is compared with the embedding, in whatever order they come.
    let mut twins: Vec<Tensor> = Vec::new();
    for (file, listed) in checkpoint::weight_files(dir)? {
        let path = dir.join(file);
        let mapped = Mapped::open(&path).hint("the checkpoint's index names this file")?;
        let tensors = mapped.tensors(&path)?;
        checkpoint::check_file(config, &tensors, &listed).at(path.display())?;
        let stores_head = tied && tensors.names().contains(&params::HEAD);
        for name in tensors.names().into_iter().filter(|name| !checkpoint::is_derived(name)) {
            let mut read = tensor_file::read_tensors(&path, &tensors, &[name], device)?;
            let Some(tensor) = read.remove(name) else { continue };
            if tied && name == params::HEAD {
                twins.push(tensor);
                continue;
            }
            if stores_head && name == params::EMBEDDING {
                twins.push(tensor.clone());
            }
            if shapes.insert(name.to_owned(), tensor.dims().to_vec()).is_some() {
                return Err(checkpoint::in_two_files(name).at(path.display()));
            }
            take(name, tensor)?;
        }
    }
    if let [one, other] = &twins[..]
        && !checkpoint::is_same(one, other)?
    {
        return Err(checkpoint::not_tied().at(dir.display()));
    }
    let shapes = shapes.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()));
    params::check_shapes(config, shapes).at(dir.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Weights;

    fn read(source: &Source) -> Weights {
        let (Source::Directory(path) | Source::Gguf(path)) = source;
        let config = checkpoint::peek(path).unwrap().0;
        let mut weights = Weights::new();
        each(source, &config, &Device::Cpu, &mut |name, tensor| {
            weights.insert(name.to_owned(), tensor);
            Ok(())
        })
        .unwrap();
        weights
    }

    fn bits(weights: &Weights) -> Vec<(String, Vec<f32>)> {
        let numbers = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        weights.iter().map(|(name, tensor)| (name.clone(), numbers(tensor))).collect()
    }

    #[test]
    fn reading_one_by_one_equals_reading_at_once() {
        for name in ["data/tiny/student", "data/tiny/teacher"] {
            let whole = Checkpoint::load_dir(name.as_ref(), &Device::Cpu).unwrap();
            assert_eq!(bits(&read(&Source::Directory(name.into()))), bits(&whole.weights));
        }
    }

    #[test]
    fn stored_head_of_a_tied_model_must_equal_the_embedding() {
        let whole = Checkpoint::load_dir("data/tiny/student".as_ref(), &Device::Cpu).unwrap();
        let mut config = whole.config.clone();
        config.tie_word_embeddings = true;
        let dir = tempfile::tempdir().unwrap();
        let mut weights = whole.weights;
        let write = |weights: &Weights| {
            let weights = weights.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
            crate::store::write_atomic_with(&dir.path().join(checkpoint::SINGLE), |out| {
                tensor_file::write(out, &weights, candle_core::DType::F32)
            })
            .unwrap();
        };
        weights.insert(params::HEAD.to_owned(), weights[params::EMBEDDING].clone());
        write(&weights);
        let mut seen = Vec::new();
        let mut run = || {
            of_directory(dir.path(), &config, &Device::Cpu, &mut |name, _| {
                seen.push(name.to_owned());
                Ok(())
            })
        };
        run().unwrap();
        weights.insert(params::HEAD.to_owned(), (&weights[params::EMBEDDING] * 2.0).unwrap());
        write(&weights);
        assert!(run().unwrap_err().to_string().contains("differs from"));
        assert!(
            !seen.contains(&params::HEAD.to_owned())
                && seen.contains(&params::EMBEDDING.to_owned())
        );
    }
}
