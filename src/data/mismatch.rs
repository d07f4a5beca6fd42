//! Responses under prompts they do not answer, from which KTO estimates the KL between policy and reference (Ethayarajh
//! et al., 2024, section 4.1).

use super::tree::{Segment, Tree};

/// Appends to every tree, as additional leaves, the responses of the previous tree, cut to `max_length` with the
/// prompt.
///
/// Like TRL, the trees of one optimizer step (`per_step` in dataset order) rotate their responses among themselves; the
/// first takes the last one's. A step of one tree takes from the tree before it. A response with no trained token left
/// is omitted; a lone tree gets none.
pub fn add_mismatched(trees: &mut [Tree], per_step: usize, max_length: usize) {
    let own: Vec<Vec<Segment>> = trees
        .iter()
        .map(|tree| {
            tree.segments.iter().filter(|segment| segment.parent == Some(0)).cloned().collect()
        })
        .collect();
    let count = trees.len();
    for (index, tree) in trees.iter_mut().enumerate() {
        let first = index - index % per_step.max(1);
        let last = (first + per_step.max(1)).min(count) - 1;
        let donor = match index {
            _ if last == first => (index + count - 1) % count,
            _ if index == first => last,
            _ => index - 1,
        };
        if donor == index {
            continue;
        }
        let room = max_length.saturating_sub(tree.segments[0].tokens.len());
        // Under an empty prompt, nothing predicts the first token.
        let predicted = usize::from(tree.segments[0].tokens.is_empty());
        for mut response in own[donor].iter().cloned() {
            response.tokens.truncate(room);
            response.roles.truncate(room);
            if response.roles.iter().skip(predicted).any(|role| role.trained()) {
                tree.segments.push(response);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::Role;

    fn tree(source: usize, responses: &[u32]) -> Tree {
        let response =
            |&id: &u32| (vec![id, id, 2], vec![Role::Content, Role::Content, Role::Format]);
        Tree::siblings(vec![1, 5], responses.iter().map(response).collect(), source)
    }

    #[test]
    fn responses_rotate_within_a_step_and_a_lone_tree_takes_the_previous() {
        let mut trees: Vec<Tree> = (0..4).map(|at| tree(at, &[10 + at as u32])).collect();
        add_mismatched(&mut trees, 3, 100);
        let given: Vec<u32> = trees.iter().map(|tree| tree.segments[2].tokens[0]).collect();
        assert_eq!(given, [12, 10, 11, 12]);
        for tree in &trees {
            tree.check().unwrap();
        }
    }

    #[test]
    fn pairs_exchange_both_responses_truncated_to_length() {
        let mut trees = [tree(0, &[10, 11]), tree(1, &[20, 21])];
        add_mismatched(&mut trees, 2, 4);
        let given: Vec<&[u32]> = trees[0].segments[3..].iter().map(|s| &s.tokens[..]).collect();
        assert_eq!(given, [[20, 20], [21, 21]]);
    }

    #[test]
    fn nothing_is_added_without_room_or_another_tree() {
        let mut trees = [tree(0, &[10]), tree(1, &[20])];
        add_mismatched(&mut trees, 2, 2);
        assert_eq!(trees[0].segments.len(), 2);
        let mut lone = [tree(0, &[10])];
        add_mismatched(&mut lone, 2, 100);
        assert_eq!(lone[0].segments.len(), 2);
    }
}
