//! A human-readable tree: trained tokens stand out, and those that only the template produced stand out differently.

use anstyle::{AnsiColor, Style};

use super::tokenizer::ChatTokenizer;
use super::tree::{Role, Tree};

/// The text of each sequence of `tree`. In colour: trained content is green, trained template tokens are yellow, the
/// rest is dimmed. Without colour: trained content in `[[…]]`, trained template tokens in `{{…}}`.
pub fn preview(tree: &Tree, tokenizer: &ChatTokenizer, colour: bool) -> String {
    let leaves = tree.leaves();
    let mut text = String::new();
    for (index, &leaf) in leaves.iter().enumerate() {
        if leaves.len() > 1 {
            let (number, count) = (index + 1, leaves.len());
            text.extend(["--- response ", &number.to_string(), " of ", &count.to_string(), "\n"]);
        }
        let (ids, roles) = tree.unroll(leaf);
        let mut start = 0;
        for run in roles.chunk_by(|a, b| a == b) {
            let ids = &ids[start..start + run.len()];
            start += run.len();
            paint(&mut text, &tokenizer.decode(ids, false), run[0], colour);
        }
        text.push('\n');
    }
    text
}

fn paint(out: &mut String, text: &str, role: Role, colour: bool) {
    let style = match role {
        Role::Context => Style::new().dimmed(),
        Role::Content => AnsiColor::Green.on_default().bold(),
        Role::Format => AnsiColor::Yellow.on_default().bold(),
    };
    let (open, close) = match role {
        _ if colour => (style.render().to_string(), style.render_reset().to_string()),
        Role::Context => (String::new(), String::new()),
        Role::Content => ("[[".to_owned(), "]]".to_owned()),
        Role::Format => ("{{".to_owned(), "}}".to_owned()),
    };
    out.push_str(&open);
    out.push_str(text);
    out.push_str(&close);
}
