//! One training example: a small tree of token segments.
//!
//! A conversation is one segment; a preference pair is a prompt with two children; a ranked list has one child per
//! response. Each leaf represents one *sequence*: the tokens on the path from the root to it.

use crate::error::{Error, Result};

/// A token's role in the losses. Assigned when the tokens are created, never derived later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Visible but not trained: prompts, system turns, tool output, headers.
    #[default]
    Context,
    /// Trained: text from the message's content.
    Content,
    /// Trained: text from the template inside a response, such as the end-of-turn token. The Llama 3 form of DPO
    /// excludes these from its log-probabilities (Llama 3, section 4.1.4).
    Format,
}

impl Role {
    /// Whether the token carries loss.
    pub fn trained(self) -> bool {
        self != Self::Context
    }
}

/// A run of tokens with at most one parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Index of the parent within the same tree; always smaller than this segment's own index.
    pub parent: Option<usize>,
    /// Token ids.
    pub tokens: Vec<u32>,
    /// One role per token.
    pub roles: Vec<Role>,
}

/// The label of one scored response; `None` is a value that the row lacks.
pub type Label = Vec<Option<f64>>;

/// One example: segments in topological order, parents first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tree {
    /// The segments; the first is the root.
    pub segments: Vec<Segment>,
    /// Labels, one for each of [`scored`](Self::scored); empty if the loss reads none.
    pub labels: Vec<Label>,
    /// Loss weight per token, over the segments laid end to end; empty if all are 1.
    pub weights: Vec<f32>,
    /// The row of the dataset: names it in errors and keys caches.
    pub source: usize,
}

impl Tree {
    /// A single sequence.
    pub fn sequence(tokens: Vec<u32>, roles: Vec<Role>, source: usize) -> Self {
        Self { segments: vec![Segment { parent: None, tokens, roles }], source, ..Self::default() }
    }

    /// A prompt (context only) with one child per response.
    pub fn siblings(
        prompt: Vec<u32>,
        responses: Vec<(Vec<u32>, Vec<Role>)>,
        source: usize,
    ) -> Self {
        let roles = vec![Role::Context; prompt.len()];
        let mut segments = vec![Segment { parent: None, tokens: prompt, roles }];
        segments.extend(responses.into_iter().map(|(tokens, roles)| Segment {
            parent: Some(0),
            tokens,
            roles,
        }));
        Self { segments, source, ..Self::default() }
    }

    /// A prompt (context only) followed by its parts in one row, one segment per part: every part sees the previous
    /// ones.
    pub fn chain(prompt: Vec<u32>, parts: Vec<(Vec<u32>, Vec<Role>)>, source: usize) -> Self {
        let mut tree = Self::siblings(prompt, parts, source);
        for (index, segment) in tree.segments.iter_mut().enumerate() {
            segment.parent = index.checked_sub(1);
        }
        tree
    }

    /// The same tree with labels, one for each of [`scored`](Self::scored).
    #[must_use]
    pub fn labelled(self, labels: Vec<Label>) -> Self {
        Self { labels, ..self }
    }

    /// Trims a single sequence to the tokens of `range`.
    pub fn keep(&mut self, range: std::ops::Range<usize>) {
        fn cut<T>(list: &mut Vec<T>, range: &std::ops::Range<usize>) {
            list.truncate(range.end);
            list.drain(..range.start.min(list.len()));
        }
        if let [segment] = &mut self.segments[..] {
            cut(&mut segment.tokens, &range);
            cut(&mut segment.roles, &range);
            cut(&mut self.weights, &range);
        }
    }

    /// Number of tokens, shared ones counted once.
    pub fn tokens(&self) -> usize {
        self.segments.iter().map(|segment| segment.tokens.len()).sum()
    }

    /// Indices of the segments without children, in order: one per sequence.
    pub fn leaves(&self) -> Vec<usize> {
        let mut is_parent = vec![false; self.segments.len()];
        for parent in self.segments.iter().filter_map(|segment| segment.parent) {
            is_parent[parent] = true;
        }
        (0..self.segments.len()).filter(|&index| !is_parent[index]).collect()
    }

    /// Indices of the segments with a trained token, in order: a reward model gives each a score, read at its last
    /// trained token. Siblings and the parts of a chain are scored alike.
    pub fn scored(&self) -> Vec<usize> {
        let trained = |segment: &Segment| segment.roles.iter().any(|role| role.trained());
        (0..self.segments.len()).filter(|&index| trained(&self.segments[index])).collect()
    }

    /// Two sequences with identical tokens, by their indices in [`leaves`](Self::leaves).
    pub fn twins(&self) -> Option<(usize, usize)> {
        let leaves = self.leaves();
        let same = |one: usize, other: usize| {
            let [a, b] = [one, other].map(|leaf| &self.segments[leaf]);
            // Siblings share their prefix, which needs no comparison.
            if a.parent == b.parent {
                a.tokens == b.tokens
            } else {
                self.unroll(one).0 == self.unroll(other).0
            }
        };
        let pairs = (0..leaves.len()).flat_map(|i| (i + 1..leaves.len()).map(move |j| (i, j)));
        pairs.into_iter().find(|&(i, j)| same(leaves[i], leaves[j]))
    }

    /// Segment indices from the root down to `leaf`.
    pub fn path(&self, leaf: usize) -> Vec<usize> {
        let mut path = vec![leaf];
        while let Some(parent) = self.segments[path[path.len() - 1]].parent {
            path.push(parent);
        }
        path.reverse();
        path
    }

    /// Tokens and roles of one sequence, laid end to end.
    pub fn unroll(&self, leaf: usize) -> (Vec<u32>, Vec<Role>) {
        let mut tokens = Vec::new();
        let mut roles = Vec::new();
        for index in self.path(leaf) {
            tokens.extend_from_slice(&self.segments[index].tokens);
            roles.extend_from_slice(&self.segments[index].roles);
        }
        (tokens, roles)
    }

    /// Checks the invariants: parents come first, one role and zero or one weight per token, no empty leaf, and no
    /// labels or one per scored segment.
    pub fn check(&self) -> Result<()> {
        let fail = |message: String| Err(Error::run(message).at(format!("row {}", self.source)));
        if self.segments.is_empty() {
            return fail("a tree without segments".to_owned());
        }
        for (index, segment) in self.segments.iter().enumerate() {
            if segment.parent.is_some_and(|parent| parent >= index) {
                return fail(format!("segment {index} stands before its parent"));
            }
            if segment.tokens.len() != segment.roles.len() {
                let (tokens, roles) = (segment.tokens.len(), segment.roles.len());
                return fail(format!("segment {index} has {tokens} tokens and {roles} roles"));
            }
        }
        let (labels, scored) = (self.labels.len(), self.scored().len());
        if labels != 0 && labels != scored {
            return fail(format!("{labels} labels for {scored} scored segments"));
        }
        if !self.weights.is_empty() && self.weights.len() != self.tokens() {
            let (weights, tokens) = (self.weights.len(), self.tokens());
            return fail(format!(
                "{weights} loss weights, expected one for each of {tokens} tokens"
            ));
        }
        match self.leaves().into_iter().find(|&leaf| self.segments[leaf].tokens.is_empty()) {
            Some(leaf) => fail(format!("segment {leaf} is an empty response")),
            None => Ok(()),
        }
    }
}
