//! The driver's memory pool, from which GPU tensors are allocated.

#![expect(unsafe_code, reason = "the pool is a handle of the driver's")]

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys::{
    CUmemPool_attribute, cuMemPoolGetAttribute, cuMemPoolSetAttribute,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, result, sys};

use CUmemPool_attribute::{
    CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as THRESHOLD,
    CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT as RESERVED, CU_MEMPOOL_ATTR_USED_MEM_CURRENT as USED,
};

fn pool(context: &CudaContext) -> Result<sys::CUmemoryPool, DriverError> {
    // SAFETY: the device of an open context.
    unsafe { result::device::get_default_mem_pool(context.cu_device()) }
}

/// Keeps freed memory in the pool: by default it is returned to the system at each synchronisation, and the next step
/// has to request it again.
pub(super) fn keep(context: &Arc<CudaContext>) -> Result<(), DriverError> {
    let (pool, mut all) = (pool(context)?, u64::MAX);
    // SAFETY: this attribute is a u64, which the call reads.
    unsafe { cuMemPoolSetAttribute(pool, THRESHOLD, (&raw mut all).cast()) }.result()
}

/// Bytes held by the pool but unused; the system counts them as allocated.
pub(super) fn spare(context: &Arc<CudaContext>) -> Result<u64, DriverError> {
    let pool = pool(context)?;
    let read = |attribute: CUmemPool_attribute| {
        let mut bytes = 0_u64;
        // SAFETY: both attributes are u64s, which the call writes.
        unsafe { cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()) }.result()?;
        Ok::<u64, DriverError>(bytes)
    };
    Ok(read(RESERVED)?.saturating_sub(read(USED)?))
}
