//! Readings that may still be on their way from a GPU.

use candle_core::{Result, Tensor};

use super::Readings;
#[cfg(feature = "cuda")]
use crate::ops::cuda::head_launch::Unread;

/// What [`backward`](super::backward) read: on the CPU it is there, on a GPU whoever wants it waits for all work that was
/// launched before.
#[derive(Debug)]
pub struct Pending(Place);

#[derive(Debug)]
enum Place {
    Host(Readings),
    /// Numbers that are no log-probabilities, such as scores.
    Values(Tensor),
    #[cfg(feature = "cuda")]
    Gpu(Box<Unread>),
}

impl Pending {
    /// The readings.
    ///
    /// # Errors
    /// The device's.
    pub fn wait(self) -> Result<Readings> {
        match self.0 {
            Place::Host(readings) => Ok(readings),
            Place::Values(values) => {
                let logps = values.detach().flatten_all()?.to_vec1()?;
                Ok(Readings { logps, rows: Vec::new() })
            }
            #[cfg(feature = "cuda")]
            Place::Gpu(unread) => unread.read(),
        }
    }
}

impl From<Readings> for Pending {
    fn from(readings: Readings) -> Self {
        Self(Place::Host(readings))
    }
}

impl From<Tensor> for Pending {
    /// Of f32: one reading an element, in their order.
    fn from(values: Tensor) -> Self {
        Self(Place::Values(values))
    }
}

#[cfg(feature = "cuda")]
impl From<Unread> for Pending {
    fn from(unread: Unread) -> Self {
        Self(Place::Gpu(Box::new(unread)))
    }
}
