//! The product against the `gemm` crate's, which Candle uses, on the shapes of a SmolLM2-135M step.
//!
//!     cargo bench --bench products
//!
//! Throughput is printed in items a second: one item is one multiply-add, so 100 G item/s are 200 GFLOP/s.

#![expect(unsafe_code, reason = "the gemm crate takes raw pointers")]

use arriero::ops::cpu::matmul::{Mat, Threads, matmul_into};
use arriero::rng::Stream;
use divan::Bencher;
use divan::counter::ItemsCount;

fn main() {
    divan::main();
}

/// Name, and M, N, K of `[M, K] · [K, N]`; how the operands lie: `NT` is `x · Wᵀ`, `NN` is `dy · W`, `TN` is `dyᵀ · x`.
#[derive(Clone, Copy)]
struct Shape(&'static str, [usize; 3], &'static str);

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [m, n, k] = self.1;
        write!(f, "{} {m}x{n}x{k} {}", self.0, self.2)
    }
}

const SHAPES: [Shape; 11] = [
    Shape("q", [2048, 576, 576], "NT"),
    Shape("gate", [2048, 1536, 576], "NT"),
    Shape("down", [2048, 576, 1536], "NT"),
    Shape("gate dX", [2048, 576, 1536], "NN"),
    Shape("gate dW", [1536, 576, 2048], "TN"),
    Shape("head", [256, 49152, 576], "NT"),
    Shape("head dX", [256, 576, 49152], "NN"),
    Shape("head dW", [49152, 576, 256], "TN"),
    Shape("decode 1", [1, 1536, 576], "NT"),
    Shape("decode 16", [16, 1536, 576], "NT"),
    Shape("decode 64", [64, 1536, 576], "NT"),
];

struct Case {
    a: Vec<f32>,
    b: Vec<f32>,
    out: Vec<f32>,
    shape: Shape,
}

impl Case {
    fn new(shape: Shape) -> Self {
        let [m, n, k] = shape.1;
        let stream = Stream::new(1, "bench");
        let (a, b) = (stream.normal(1, m * k, 1.0), stream.normal(2, n * k, 1.0));
        Self { a, b, out: vec![0.0; m * n], shape }
    }

    fn ours(&mut self) {
        let [m, n, k] = self.shape.1;
        let (a, b) = match self.shape.2 {
            "NT" => (Mat::new(&self.a, m, k), Mat::new(&self.b, n, k).t()),
            "NN" => (Mat::new(&self.a, m, k), Mat::new(&self.b, k, n)),
            _ => (Mat::new(&self.a, k, m).t(), Mat::new(&self.b, k, n)),
        };
        matmul_into(&mut self.out, a, b, false, Threads::All);
    }

    fn gemm(&mut self) {
        let [m, n, k] = self.shape.1;
        let signed = |(row, column): (usize, usize)| (row as isize, column as isize);
        let (a, b) = match self.shape.2 {
            "NT" => (signed((k, 1)), signed((1, k))),
            "NN" => (signed((k, 1)), signed((n, 1))),
            _ => (signed((1, m)), signed((n, 1))),
        };
        // SAFETY: the strides describe the buffers that `new` made.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                self.out.as_mut_ptr(),
                1,
                n as isize,
                false,
                self.a.as_ptr(),
                a.1,
                a.0,
                self.b.as_ptr(),
                b.1,
                b.0,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
    }
}

fn bench(bencher: Bencher<'_, '_>, shape: Shape, run: impl Fn(&mut Case)) {
    let mut case = Case::new(shape);
    bencher
        .counter(ItemsCount::new(shape.1.iter().product::<usize>()))
        .bench_local(|| run(&mut case));
}

#[divan::bench(args = SHAPES, sample_count = 12)]
fn ours(bencher: Bencher<'_, '_>, shape: Shape) {
    bench(bencher, shape, Case::ours);
}

#[divan::bench(args = SHAPES, sample_count = 12)]
fn gemm_crate(bencher: Bencher<'_, '_>, shape: Shape) {
    bench(bencher, shape, Case::gemm);
}
