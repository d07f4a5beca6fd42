//! Launch limits: the driver takes block counts, and cuBLAS sizes, in 32 bits. Elements are counted in 64.

use candle_core::{Result, bail};

/// Largest grid along x and y.
const MOST: [usize; 2] = [i32::MAX as usize, 65_535];

/// Block counts in the driver's types.
///
/// # Errors
/// Zero, or more than a GPU supports; names the op.
pub(super) fn blocks(op: &str, (x, y): (usize, usize)) -> Result<(u32, u32)> {
    let [most_x, most_y] = MOST;
    if (1..=most_x).contains(&x) && (1..=most_y).contains(&y) {
        return Ok((x as u32, y as u32));
    }
    bail!("{op}: a grid of {x} by {y} blocks, expected 1 by 1 to {most_x} by {most_y}")
}

/// Product sizes in cuBLAS's type.
///
/// # Errors
/// A size that is too large; names the op.
pub(super) fn sizes<const N: usize>(op: &str, sizes: [usize; N]) -> Result<[i32; N]> {
    if sizes.iter().any(|&size| size > i32::MAX as usize) {
        bail!("{op}: a product of sizes {sizes:?}, expected {} at most", i32::MAX);
    }
    Ok(sizes.map(|size| size as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_limit_errors_name_the_op_and_its_sizes() {
        assert_eq!(blocks("norm", (1 << 20, 65_535)).unwrap(), (1 << 20, 65_535));
        let most = i32::MAX as usize;
        assert_eq!(blocks("norm", (most, 1)).unwrap(), (i32::MAX as u32, 1));
        for (x, y) in [(most + 1, 1), (1, 65_536), (0, 1), (1, 0), ((1 << 32) + 1, 1)] {
            let error = blocks("norm", (x, y)).unwrap_err().to_string();
            let expected = format!("norm: a grid of {x} by {y} blocks, expected 1 by 1 to ");
            assert!(error.starts_with(&expected), "{error}");
        }
        assert_eq!(sizes("head", [3, most]).unwrap(), [3, i32::MAX]);
        let error = sizes("head", [3, most + 1, 5]).unwrap_err().to_string();
        assert!(error.starts_with("head: a product of sizes [3, 2147483648, 5]"), "{error}");
    }
}
