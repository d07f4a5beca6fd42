//! Gradient norms: global for clipping, and per part of the model for logging.

use std::collections::BTreeMap;

use crate::report::record::Metrics;

/// Sums of squares of gradients.
#[derive(Clone, Debug, Default)]
pub(super) struct Norms {
    total: f64,
    parts: BTreeMap<&'static str, f64>,
}

impl Norms {
    /// Adds the sum of squares of one parameter's gradient.
    pub(super) fn add(&mut self, name: &str, square: f64) {
        self.total += square;
        *self.parts.entry(part(name)).or_default() += square;
    }

    /// Euclidean norm of everything added, summed in that order.
    pub(super) fn total(&self) -> f64 {
        self.total.sqrt()
    }

    /// Logs `grad_norm/<part>` for each part.
    pub(super) fn log(&self, metrics: &mut Metrics) {
        let parts = self.parts.iter();
        metrics.extend(parts.map(|(part, square)| (format!("grad_norm/{part}"), square.sqrt())));
    }
}

/// The part of the model that a parameter belongs to. A tied head counts as embedding.
fn part(name: &str) -> &'static str {
    if name.contains("norm.") {
        return "norms";
    }
    [(".self_attn.", "attention"), (".mlp.", "mlp"), ("embed_tokens.", "embedding")]
        .into_iter()
        .find(|(within, _)| name.contains(within))
        .map_or("head", |(_, part)| part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradient_norms_are_logged_per_model_part() {
        let mut norms = Norms::default();
        for (name, square) in [
            ("lm_head.weight", 1.0),
            ("model.embed_tokens.weight", 4.0),
            ("model.layers.0.input_layernorm.weight", 9.0),
            ("model.layers.0.mlp.up_proj.weight", 16.0),
            ("model.layers.0.self_attn.k_proj.weight", 20.0),
            ("model.layers.0.self_attn.q_norm.weight", 7.0),
            ("model.layers.1.self_attn.k_proj.bias", 5.0),
            ("score.weight", 2.0),
        ] {
            norms.add(name, square);
        }
        let mut metrics = Metrics::new();
        norms.log(&mut metrics);
        let expected = [
            ("attention", 25.0),
            ("embedding", 4.0),
            ("head", 3.0),
            ("mlp", 16.0),
            ("norms", 16.0),
        ];
        let expected =
            expected.map(|(part, square): (_, f64)| (format!("grad_norm/{part}"), square.sqrt()));
        assert_eq!(metrics, Metrics::from(expected));
        assert_eq!(norms.total().to_bits(), 8.0_f64.to_bits());
    }
}
