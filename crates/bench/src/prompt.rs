//! Prompts: code-like text of a wanted number of tokens, and conversations that grow.

use crate::dist::Random;

/// Words of the text; each is about one token in common vocabularies.
const NAMES: [&str; 32] = [
    "buffer", "index", "node", "value", "count", "offset", "result", "parser", "token", "state", "queue",
    "block", "cache", "table", "length", "source", "target", "config", "client", "stream", "header",
    "record", "batch", "error", "path", "key", "entry", "size", "input", "output", "reader", "writer",
];

/// Lines of made-up code; `@` stands for a name, `#` for a small number.
const LINES: [&str; 14] = [
    "fn @_@(@: &mut @, @: usize) -> Option<@> {\n",
    "    let @ = @.get(@)?;\n",
    "    let mut @ = @::with_@(@.len() + #);\n",
    "    if @.is_empty() || @ > # {\n",
    "        return None;\n",
    "    }\n",
    "    for @ in @.iter().take(#) {\n",
    "        @.push(@.@ * # + @);\n",
    "        @[@ % #] = @.clone();\n",
    "    }\n",
    "    // the @ of the @ follows its @\n",
    "    @.@(@, #).map(|@| @ + #)\n",
    "}\n",
    "\n",
];

/// An endless, seeded text in pieces of one to four tokens each. It opens with a random mark, so
/// that no two texts share more than a few tokens from their start.
pub(crate) struct CodeText {
    rng: Random,
    pieces: Vec<String>,
}

impl CodeText {
    /// A text of its own for each state of `rng`.
    pub(crate) fn new(rng: &mut Random) -> Self {
        let mut rng = Random::new(rng.next(), 0);
        let mark = format!("// {:016x}", rng.next());
        let mut pieces: Vec<String> = mark.split_inclusive(|_| true).map(String::from).collect();
        pieces.push("\n".to_string());
        Self { rng, pieces }
    }

    /// The text's first `pieces` pieces.
    pub(crate) fn take(&mut self, pieces: usize) -> String {
        while self.pieces.len() < pieces {
            let line = LINES[self.rng.below(LINES.len())];
            self.add_line(line);
        }
        self.pieces[..pieces].concat()
    }

    fn add_line(&mut self, line: &str) {
        let mut plain = String::new();
        for c in line.chars() {
            match c {
                '@' => {
                    self.pieces.extend((!plain.is_empty()).then(|| std::mem::take(&mut plain)));
                    self.pieces.push(NAMES[self.rng.below(NAMES.len())].to_string());
                }
                '#' => plain += &self.rng.below(10).to_string(),
                c => plain.push(c),
            }
        }
        self.pieces.extend((!plain.is_empty()).then_some(plain));
    }
}

/// Tokens in a piece where nothing better is known: that of Qwen2.5's tokenizer.
pub(crate) const TOKENS_PER_PIECE: f64 = 1.5;

/// The search for a text of a wanted number of tokens, by someone else's count.
pub(crate) struct Fit {
    code: CodeText,
    tokens: usize,
    pieces: usize,
    rounds: usize,
    text: String,
}

impl Fit {
    /// Begins with a text that has `tokens` tokens by estimate.
    pub(crate) fn new(rng: &mut Random, tokens: usize, tokens_per_piece: f64) -> Self {
        let mut code = CodeText::new(rng);
        let pieces = ((tokens as f64 / tokens_per_piece) as usize).max(1);
        let text = code.take(pieces);
        Self { code, tokens, pieces, rounds: 0, text }
    }

    /// The text so far.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Corrects the text, which was counted to have `counted` tokens; says whether it is done.
    pub(crate) fn correct(&mut self, counted: usize) -> bool {
        if counted <= self.tokens && self.tokens - counted <= FILL {
            self.text += &" x".repeat(self.tokens - counted);
            return true;
        }
        // Aim half the filler below the goal, so that most texts are done in the second round.
        let goal = (self.tokens as f64 - FILL as f64 / 2.0).max(1.0);
        // A step is bounded, so that a count which makes no sense cannot ask for a text without end.
        let factor = (goal / counted.max(1) as f64).clamp(0.25, 4.0);
        let next = ((self.pieces as f64 * factor).round() as usize).max(1);
        self.rounds += 1;
        if next == self.pieces || self.rounds == ROUNDS {
            return true;
        }
        self.pieces = next;
        self.text = self.code.take(next);
        false
    }

    /// The text found.
    pub(crate) fn into_text(self) -> String {
        self.text
    }
}

/// Most corrections of a text's length; it is then near enough.
const ROUNDS: usize = 6;
/// Most filler words (one token each) at the end of a text.
const FILL: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// A stand-in for a tokenizer: words are a token each, and so is any other visible character.
    fn count(text: &str) -> usize {
        let chars: Vec<char> = std::iter::once(' ').chain(text.chars()).collect();
        let begins = |w: &&[char]| !(w[1].is_whitespace() || w[0].is_alphabetic() && w[1].is_alphabetic());
        chars.windows(2).filter(begins).count()
    }

    #[test]
    fn a_text_has_the_wanted_tokens_by_the_count_it_is_given() {
        for tokens in [20, 64, 300, 2000] {
            for estimate in [0.7, 1.5, 3.0] {
                let mut fit = Fit::new(&mut Random::new(tokens as u64, 0), tokens, estimate);
                while !fit.correct(count(fit.text())) {}
                assert_eq!(count(fit.text()), tokens);
            }
        }
    }

    #[test]
    fn a_count_that_makes_no_sense_ends_the_search() {
        for nonsense in [0, 1, usize::MAX] {
            let mut fit = Fit::new(&mut Random::new(1, 0), 300, 1.5);
            let rounds = (0..100).take_while(|_| !fit.correct(nonsense)).count();
            assert!(rounds < ROUNDS && fit.into_text().len() < 100_000_000);
        }
    }

    #[test]
    fn texts_differ_from_their_start() {
        let mut rng = Random::new(3, 0);
        let starts: HashSet<String> = (0..1000).map(|_| CodeText::new(&mut rng).take(11)).collect();
        assert_eq!(starts.len(), 1000);
    }
}
