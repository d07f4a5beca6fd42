//! Readings that may still be on their way from a GPU.

use candle_core::Result;

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

#[cfg(feature = "cuda")]
impl From<Unread> for Pending {
    fn from(unread: Unread) -> Self {
        Self(Place::Gpu(Box::new(unread)))
    }
}
