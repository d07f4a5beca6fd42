//! The packed forest: the only batch format.
//!
//! Trees are laid end to end in one row of tokens without padding. A token attends to its own segment up to itself and
//! to every ancestor segment; positions continue from the parent. Packing never changes which examples form an
//! optimizer step: a step's trees are split into micro-batches by a token budget.

use std::borrow::Borrow;
use std::ops::Range;

use super::examples::Examples;
use super::tree::{Label, Role, Tree};
use crate::error::Result;

/// Location of one segment in the packed row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// First token's index in the packed row.
    pub start: usize,
    /// Number of tokens; zero for an empty prompt.
    pub len: usize,
    /// Index of the parent span, smaller than this span's own.
    pub parent: Option<usize>,
    /// Position of the first token: the number of tokens on the path above it.
    pub position: usize,
    /// Index of its tree in the forest.
    pub tree: usize,
}

/// One prediction that a loss may weigh: hidden `row` predicts token `id` for one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Index of the hidden row that makes the prediction.
    pub row: u32,
    /// The predicted token.
    pub id: u32,
    /// Index into [`Forest::leaves`] of the sequence it counts towards.
    pub leaf: u32,
    /// [`Role::Content`] or [`Role::Format`].
    pub role: Role,
}

/// One sequence of the forest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Index of its tree in the forest.
    pub tree: usize,
    /// Index of the leaf's span.
    pub span: usize,
}

/// A position where a reward model is read: the last trained token of a segment, such as a response's end-of-turn
/// token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct End {
    /// Index of its tree in the forest.
    pub tree: usize,
    /// The hidden row.
    pub row: usize,
    /// Trained tokens of the segment.
    pub length: usize,
    /// Label from the row; empty if the tree has no labels.
    pub label: Label,
}

/// A packed micro-batch. `T` = number of tokens.
#[derive(Clone, Debug, Default)]
pub struct Forest {
    /// Token ids, `[T]`.
    pub tokens: Vec<u32>,
    /// Positions for the rotary embedding, `[T]`.
    pub positions: Vec<u32>,
    /// Segments, parents first.
    pub spans: Vec<Span>,
    /// Sequences, tree by tree.
    pub leaves: Vec<Leaf>,
    /// Positions where scores are read, tree by tree, in the order of [`Tree::scored`].
    pub ends: Vec<End>,
    /// Every trained prediction, `[N]`, sequence by sequence. A target in a shared segment appears once per sequence.
    pub targets: Vec<Target>,
    /// Loss weight of each target, `[N]`; empty if all are 1. Read by token losses.
    pub weights: Vec<f32>,
    /// `source` of each tree.
    pub sources: Vec<usize>,
}

impl Forest {
    /// Packs trees in the given order.
    ///
    /// # Errors
    /// A tree that breaks its invariants, or more than 2³² tokens.
    pub fn pack<'a>(trees: impl IntoIterator<Item = &'a Tree>) -> Result<Self> {
        let mut forest = Self::default();
        for tree in trees {
            tree.check()?;
            forest.push(tree);
        }
        u32::try_from(forest.tokens.len())?;
        Ok(forest)
    }

    /// Number of tokens, `T`.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether the forest has no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Number of trees.
    pub fn trees(&self) -> usize {
        self.sources.len()
    }

    /// Indices of `span` and its ancestors, root first.
    pub fn path(&self, span: usize) -> Vec<usize> {
        let mut path = vec![span];
        while let Some(parent) = self.spans[path[path.len() - 1]].parent {
            path.push(parent);
        }
        path.reverse();
        path
    }

    fn push(&mut self, tree: &Tree) {
        let first_span = self.spans.len();
        let index = self.sources.len();
        for segment in &tree.segments {
            let parent = segment.parent.map(|parent| parent + first_span);
            let position = parent.map_or(0, |p| self.spans[p].position + self.spans[p].len);
            let (start, len) = (self.tokens.len(), segment.tokens.len());
            self.tokens.extend_from_slice(&segment.tokens);
            self.positions.extend((0..len).map(|offset| (position + offset) as u32));
            self.spans.push(Span { start, len, parent, position, tree: index });
        }
        self.sources.push(tree.source);
        for (place, segment) in tree.scored().into_iter().enumerate() {
            let roles = &tree.segments[segment].roles;
            let last = roles.iter().rposition(|role| role.trained()).unwrap_or_default();
            self.ends.push(End {
                tree: index,
                row: self.spans[first_span + segment].start + last,
                length: roles.iter().filter(|role| role.trained()).count(),
                label: tree.labels.get(place).cloned().unwrap_or_default(),
            });
        }
        if !tree.weights.is_empty() {
            self.weights.resize(self.targets.len(), 1.0);
        }
        for leaf in tree.leaves() {
            self.push_leaf(tree, leaf, first_span, index);
        }
        if !self.weights.is_empty() {
            self.weights.resize(self.targets.len(), 1.0);
        }
    }

    fn push_leaf(&mut self, tree: &Tree, leaf: usize, first_span: usize, tree_index: usize) {
        let leaf_index = self.leaves.len() as u32;
        let mut previous: Option<usize> = None;
        for segment_index in tree.path(leaf) {
            let segment = &tree.segments[segment_index];
            let start = self.spans[first_span + segment_index].start;
            for (offset, (&id, &role)) in segment.tokens.iter().zip(&segment.roles).enumerate() {
                // The first token of a sequence has no row that predicts it.
                if let Some(row) = previous.filter(|_| role.trained()) {
                    self.targets.push(Target { row: row as u32, id, leaf: leaf_index, role });
                    // The tree's own tokens start at its first span.
                    let token = start + offset - self.spans[first_span].start;
                    self.weights.extend(tree.weights.get(token));
                }
                previous = Some(start + offset);
            }
        }
        self.leaves.push(Leaf { tree: tree_index, span: first_span + leaf });
    }
}

/// Splits a step's trees into consecutive micro-batches of at most `budget` tokens. A tree larger than the budget gets
/// its own.
pub fn micro_batches<T: Borrow<Tree>>(trees: &[T], budget: usize) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (index, tree) in trees.iter().enumerate() {
        let tokens = tree.borrow().tokens();
        if index > start && filled + tokens > budget {
            ranges.push(start..index);
            (start, filled) = (index, 0);
        }
        filled += tokens;
    }
    if start < trees.len() {
        ranges.push(start..trees.len());
    }
    ranges
}

/// Packs examples, in order, into the forests that [`micro_batches`] yields, one at a time.
pub fn packed(examples: &dyn Examples, budget: usize) -> impl Iterator<Item = Result<Forest>> {
    let mut trees = examples.trees().peekable();
    std::iter::from_fn(move || {
        let mut batch: Vec<Tree> = Vec::new();
        let mut filled = 0;
        loop {
            let fits = match trees.peek() {
                None => false,
                Some(Ok(tree)) => batch.is_empty() || filled + tree.tokens() <= budget,
                Some(Err(_)) => true,
            };
            match trees.next_if(|_| fits) {
                None => break,
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(tree)) => {
                    filled += tree.tokens();
                    batch.push(tree);
                }
            }
        }
        (!batch.is_empty()).then(|| Forest::pack(&batch))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::Segment;
    use Role::{Content, Context, Format};

    fn segment(parent: Option<usize>, tokens: &[u32], role: Role) -> Segment {
        Segment { parent, tokens: tokens.to_vec(), roles: vec![role; tokens.len()] }
    }

    #[test]
    fn a_pair_shares_its_prompt_and_restarts_positions() {
        let mut chosen = segment(Some(0), &[4, 2], Content);
        chosen.roles[1] = Format;
        let tree = Tree {
            segments: vec![
                segment(None, &[1, 5, 9], Context),
                chosen,
                segment(Some(0), &[7], Content),
            ],
            source: 3,
            ..Tree::default()
        };
        let forest = Forest::pack([&tree]).unwrap();
        assert_eq!(forest.tokens, [1, 5, 9, 4, 2, 7]);
        assert_eq!(forest.positions, [0, 1, 2, 3, 4, 3]);
        let target = |row, id, leaf, role| Target { row, id, leaf, role };
        // The prompt's last row predicts the first token of both children.
        assert_eq!(
            forest.targets,
            [target(2, 4, 0, Content), target(3, 2, 0, Format), target(2, 7, 1, Content)]
        );
        assert_eq!(
            forest.ends.iter().map(|end| (end.row, end.length)).collect::<Vec<_>>(),
            [(4, 2), (5, 1)]
        );
        assert_eq!(forest.sources, [3]);
    }

    #[test]
    fn shared_prompt_target_counts_once_per_sequence() {
        let tree = Tree {
            segments: vec![
                segment(None, &[1, 5], Content),
                segment(Some(0), &[4], Content),
                segment(Some(0), &[7], Content),
            ],
            ..Tree::default()
        };
        let forest = Forest::pack([&tree]).unwrap();
        assert_eq!(forest.targets.iter().filter(|target| target.id == 5).count(), 2);
        assert_eq!(forest.targets.iter().filter(|target| target.id == 1).count(), 0);
    }

    #[test]
    fn micro_batches_keep_order_and_budget() {
        let owned: Vec<Tree> = [3, 4, 9, 1, 1]
            .iter()
            .map(|&len| Tree::sequence(vec![0; len], vec![Content; len], 0))
            .collect();
        let trees: Vec<&Tree> = owned.iter().collect();
        assert_eq!(micro_batches(&trees, 7), [0..2, 2..3, 3..5]);
        assert!(micro_batches::<&Tree>(&[], 7).is_empty());
        // Packing one at a time splits at the same places.
        let sizes: Vec<usize> = packed(&owned, 7).map(|forest| forest.unwrap().trees()).collect();
        assert_eq!(sizes, [2, 1, 2]);
    }

    #[test]
    fn chain_parts_see_earlier_parts_and_are_scored_at_their_ends() {
        let part = |tokens: &[u32]| (tokens.to_vec(), vec![Content; tokens.len()]);
        let chain = Tree::chain(vec![1, 5], vec![part(&[4, 2]), part(&[7])], 0);
        let labelled = chain.clone().labelled(vec![vec![Some(1.0)], vec![None]]);
        let forest = Forest::pack([&labelled]).unwrap();
        assert_eq!(forest.positions, [0, 1, 2, 3, 4]);
        assert_eq!(forest.path(2), [0, 1, 2]);
        let end = |row, length, label| End { tree: 0, row, length, label: vec![label] };
        assert_eq!(forest.ends, [end(3, 2, Some(1.0)), end(4, 1, None)]);
        let error = chain.labelled(vec![vec![]; 3]).check().unwrap_err();
        assert_eq!(error.to_string(), "row 0: 3 labels for 2 scored segments");
    }

    #[test]
    fn an_empty_response_is_refused() {
        let tree = Tree::siblings(vec![1], vec![(vec![], vec![])], 12);
        assert_eq!(tree.check().unwrap_err().to_string(), "row 12: segment 1 is an empty response");
    }
}
