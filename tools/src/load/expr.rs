//! Expressions of `\set` in load scripts: pgbench's integers, operators and random distributions.
//! Called by the script parser; knows no connection. The random generator comes in as an argument.

use rand::RngExt;
use rand::rngs::Xoshiro256PlusPlus;

/// Parentheses and calls nested deeper are refused, so that evaluation cannot exhaust the stack.
const NESTING_MAX: usize = 64;
/// pgbench's bounds for the parameter of random_zipfian.
const ZIPF_PARAMETER_MIN: f64 = 1.001;
const ZIPF_PARAMETER_MAX: f64 = 1000.0;
/// pgbench's lower bound for the parameter of random_gaussian.
const GAUSS_PARAMETER_MIN: f64 = 2.0;

/// The generator of a client: seeded, so that a run can be repeated.
pub type Random = Xoshiro256PlusPlus;

/// An expression over integers and variables.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// A literal.
    Int(i64),
    /// A variable, by its slot.
    Var(usize),
    /// `-x`
    Negate(Box<Expr>),
    /// `+ - * / %`
    Binary(u8, Box<Expr>, Box<Expr>),
    /// `abs`, `least`, `greatest`
    Call(Function, Vec<Expr>),
    /// A random integer between two bounds, both included.
    Random(Distribution, Box<Expr>, Box<Expr>),
}

/// The functions without randomness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// Absolute value.
    Abs,
    /// Smallest argument.
    Least,
    /// Largest argument.
    Greatest,
}

/// How random integers are spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    /// Each equally likely.
    Uniform,
    /// The k-th smallest in proportion to 1/k^s.
    Zipfian(f64),
    /// Truncated exponential.
    Exponential(f64),
    /// Truncated normal, centred.
    Gaussian(f64),
}

/// Why an expression has no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExprError {
    /// `/ 0` or `% 0`.
    #[error("division by zero")]
    DivisionByZero,
    /// The result does not fit 64 bits.
    #[error("the number is out of range")]
    Overflow,
    /// `random(5, 1)`.
    #[error("random needs its lower bound first: {0} > {1}")]
    EmptyRange(i64, i64),
}

impl Expr {
    /// The value, given the variables.
    pub fn value(&self, variables: &[i64], random: &mut Random) -> Result<i64, ExprError> {
        match self {
            Expr::Int(number) => Ok(*number),
            Expr::Var(slot) => Ok(variables[*slot]),
            Expr::Negate(inner) => inner.value(variables, random)?.checked_neg().ok_or(ExprError::Overflow),
            Expr::Binary(operator, left, right) => {
                let (left, right) = (left.value(variables, random)?, right.value(variables, random)?);
                if right == 0 && matches!(operator, b'/' | b'%') {
                    return Err(ExprError::DivisionByZero);
                }
                let result = match operator {
                    b'+' => left.checked_add(right),
                    b'-' => left.checked_sub(right),
                    b'*' => left.checked_mul(right),
                    b'/' => left.checked_div(right),
                    _ => left.checked_rem(right),
                };
                result.ok_or(ExprError::Overflow)
            }
            Expr::Call(function, arguments) => {
                let mut values = arguments.iter().map(|argument| argument.value(variables, random));
                let first = values.next().unwrap_or(Ok(0))?;
                match function {
                    Function::Abs => first.checked_abs().ok_or(ExprError::Overflow),
                    Function::Least => values.try_fold(first, |least, next| Ok(least.min(next?))),
                    Function::Greatest => values.try_fold(first, |most, next| Ok(most.max(next?))),
                }
            }
            Expr::Random(distribution, low, high) => {
                let (low, high) = (low.value(variables, random)?, high.value(variables, random)?);
                if low > high {
                    return Err(ExprError::EmptyRange(low, high));
                }
                Ok(distribution.draw(low, high, random))
            }
        }
    }
}

impl Distribution {
    /// A random integer from `low` to `high`, both included.
    pub fn draw(self, low: i64, high: i64, random: &mut Random) -> i64 {
        let span = high.wrapping_sub(low) as u64 as f64 + 1.0;
        let offset = match self {
            Distribution::Uniform => return random.random_range(low..=high),
            Distribution::Zipfian(s) => zipfian(span, s, random) - 1.0,
            Distribution::Exponential(parameter) => {
                let cut = (-parameter).exp();
                let uniform = 1.0 - random.random::<f64>();
                span * (-(cut + (1.0 - cut) * uniform).ln() / parameter)
            }
            Distribution::Gaussian(parameter) => {
                let deviation = loop {
                    // Box-Muller; values outside of the truncation are drawn again.
                    let (u, v) = (1.0 - random.random::<f64>(), 1.0 - random.random::<f64>());
                    let normal = (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).sin();
                    if (-parameter..parameter).contains(&normal) {
                        break normal;
                    }
                };
                span * (deviation + parameter) / (parameter * 2.0)
            }
        };
        low.saturating_add(offset as i64).clamp(low, high)
    }
}

/// A rank from 1 to `n`, by rejection (Devroye, "Non-Uniform Random Variate Generation", p. 550), as pgbench does.
fn zipfian(n: f64, s: f64, random: &mut Random) -> f64 {
    let b = 2f64.powf(s - 1.0);
    loop {
        let (u, v) = (random.random::<f64>(), random.random::<f64>());
        let x = u.powf(-1.0 / (s - 1.0)).floor();
        let t = (1.0 + 1.0 / x).powf(s - 1.0);
        if v * x * (t - 1.0) / (b - 1.0) <= t / b && x <= n {
            return x;
        }
    }
}

/// Parses an expression; `slot` finds the slot of a variable, if there is one of this name.
pub fn parse(text: &str, slot: &dyn Fn(&str) -> Option<usize>) -> Result<Expr, String> {
    let mut parser = Parser { rest: text, slot };
    let expr = parser.sum(0)?;
    match parser.peek() {
        None => Ok(expr),
        Some(other) => Err(format!("unexpected {other:?} in the expression")),
    }
}

struct Parser<'a> {
    rest: &'a str,
    slot: &'a dyn Fn(&str) -> Option<usize>,
}

impl<'a> Parser<'a> {
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn take(&mut self, expected: char) -> Result<(), String> {
        match self.peek() {
            Some(found) if found == expected => {
                self.rest = &self.rest[found.len_utf8()..];
                Ok(())
            }
            Some(found) => Err(format!("expected {expected:?} and found {found:?}")),
            None => Err(format!("expected {expected:?} and found the end of the line")),
        }
    }

    fn word(&mut self, fits: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !fits(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn sum(&mut self, depth: usize) -> Result<Expr, String> {
        let mut left = self.product(depth)?;
        while let Some(operator @ ('+' | '-')) = self.peek() {
            self.take(operator)?;
            left = Expr::Binary(operator as u8, Box::new(left), Box::new(self.product(depth)?));
        }
        Ok(left)
    }

    fn product(&mut self, depth: usize) -> Result<Expr, String> {
        let mut left = self.atom(depth)?;
        while let Some(operator @ ('*' | '/' | '%')) = self.peek() {
            self.take(operator)?;
            left = Expr::Binary(operator as u8, Box::new(left), Box::new(self.atom(depth)?));
        }
        Ok(left)
    }

    fn atom(&mut self, depth: usize) -> Result<Expr, String> {
        if depth > NESTING_MAX {
            return Err(format!("the expression is nested deeper than {NESTING_MAX}"));
        }
        match self.peek() {
            Some('(') => {
                self.take('(')?;
                let inner = self.sum(depth + 1)?;
                self.take(')')?;
                Ok(inner)
            }
            Some('-') => {
                self.take('-')?;
                Ok(Expr::Negate(Box::new(self.atom(depth + 1)?)))
            }
            Some(':') => {
                self.take(':')?;
                let name = self.word(|c| c.is_ascii_alphanumeric() || c == '_');
                (self.slot)(name).map(Expr::Var).ok_or_else(|| format!("the variable :{name} was never set"))
            }
            Some(c) if c.is_ascii_digit() => {
                let digits = self.word(|c| c.is_ascii_digit());
                digits.parse().map(Expr::Int).map_err(|_| format!("{digits} does not fit 64 bits"))
            }
            Some(c) if c.is_ascii_alphabetic() => self.call(depth),
            Some(other) => Err(format!("unexpected {other:?} in the expression")),
            None => Err("the expression ends too early".to_owned()),
        }
    }

    fn call(&mut self, depth: usize) -> Result<Expr, String> {
        let name = self.word(|c| c.is_ascii_alphanumeric() || c == '_');
        self.take('(')?;
        let parameters = match name {
            "random" => None,
            "random_zipfian" | "random_exponential" | "random_gaussian" => Some(name),
            "abs" | "least" | "greatest" => return self.plain_call(name, depth),
            _ => {
                return Err(format!(
                    "no function {name}; there are random, random_zipfian, random_exponential, random_gaussian, \
                     abs, least, greatest"
                ));
            }
        };
        let low = Box::new(self.sum(depth + 1)?);
        self.take(',')?;
        let high = Box::new(self.sum(depth + 1)?);
        let distribution = match parameters {
            None => Distribution::Uniform,
            Some(name) => {
                self.take(',')?;
                self.distribution(name)?
            }
        };
        self.take(')')?;
        Ok(Expr::Random(distribution, low, high))
    }

    fn distribution(&mut self, name: &str) -> Result<Distribution, String> {
        self.peek();
        let text = self.word(|c| c.is_ascii_digit() || c == '.');
        let parameter: f64 = text.parse().map_err(|_| format!("{name} needs a number as its third argument"))?;
        match name {
            "random_zipfian" if (ZIPF_PARAMETER_MIN..=ZIPF_PARAMETER_MAX).contains(&parameter) => {
                Ok(Distribution::Zipfian(parameter))
            }
            "random_zipfian" => Err(format!(
                "the parameter of random_zipfian must be from {ZIPF_PARAMETER_MIN} to {ZIPF_PARAMETER_MAX}, not {text}"
            )),
            "random_exponential" if parameter > 0.0 => Ok(Distribution::Exponential(parameter)),
            "random_exponential" => Err(format!("the parameter of random_exponential must be above 0, not {text}")),
            _ if parameter >= GAUSS_PARAMETER_MIN => Ok(Distribution::Gaussian(parameter)),
            _ => Err(format!("the parameter of random_gaussian must be at least {GAUSS_PARAMETER_MIN}, not {text}")),
        }
    }

    fn plain_call(&mut self, name: &str, depth: usize) -> Result<Expr, String> {
        let mut arguments = vec![self.sum(depth + 1)?];
        while self.peek() == Some(',') {
            self.take(',')?;
            arguments.push(self.sum(depth + 1)?);
        }
        self.take(')')?;
        match (name, arguments.len()) {
            ("abs", 1) => Ok(Expr::Call(Function::Abs, arguments)),
            ("abs", _) => Err("abs takes one argument".to_owned()),
            ("least", _) => Ok(Expr::Call(Function::Least, arguments)),
            _ => Ok(Expr::Call(Function::Greatest, arguments)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    const DRAWS: usize = 20_000;

    fn slot(name: &str) -> Option<usize> {
        ["scale", "x"].iter().position(|known| *known == name)
    }

    fn value(text: &str) -> Result<i64, ExprError> {
        parse(text, &slot).unwrap().value(&[3, -7], &mut Random::seed_from_u64(1))
    }

    fn draws(text: &str) -> Vec<i64> {
        let expr = parse(text, &slot).unwrap();
        let mut random = Random::seed_from_u64(42);
        (0..DRAWS).map(|_| expr.value(&[3, -7], &mut random).unwrap()).collect()
    }

    #[test]
    fn arithmetic_is_integer_arithmetic_with_the_usual_precedence() {
        assert_eq!(value("1 + 2 * 3"), Ok(7));
        assert_eq!(value("(1 + 2) * :scale - -4"), Ok(13));
        assert_eq!(value("7 / 2 % 2 - abs(:x)"), Ok(-6));
        assert_eq!(value("least(4, :x, 9) + greatest(1, 100000 * :scale)"), Ok(299_993));
        assert_eq!(value("1 / (:scale - 3)"), Err(ExprError::DivisionByZero));
        assert_eq!(value("9223372036854775807 + 1"), Err(ExprError::Overflow));
        assert_eq!(value("random(5, 1)"), Err(ExprError::EmptyRange(5, 1)));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, says) in [
            ("1 +", "ends too early"),
            (":aid + 1", ":aid was never set"),
            ("rnd(1, 2)", "no function rnd"),
            ("random(1 2)", "expected ','"),
            ("random_zipfian(1, 2, 1.0)", "from 1.001 to 1000"),
            ("random_gaussian(1, 2, 1.5)", "at least 2"),
            ("1 2", "unexpected '2'"),
            ("abs(1, 2)", "one argument"),
        ] {
            let error = parse(text, &slot).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        let deep = format!("{}1{}", "(".repeat(100), ")".repeat(100));
        assert!(parse(&deep, &slot).unwrap_err().contains("nested deeper"));
    }

    #[test]
    fn uniform_reaches_both_bounds_evenly() {
        let drawn = draws("random(1, 10)");
        for number in 1..=10 {
            let times = drawn.iter().filter(|n| **n == number).count();
            assert!((1_700..2_300).contains(&times), "{number} came {times} times of {DRAWS}");
        }
        assert!(drawn.iter().all(|n| (1..=10).contains(n)));
        assert!(draws("random(-9223372036854775807, 9223372036854775807)").iter().any(|n| *n < 0));
    }

    #[test]
    fn zipfian_follows_its_law() {
        let drawn = draws("random_zipfian(1, 1000, 1.5)");
        assert!(drawn.iter().all(|n| (1..=1000).contains(n)));
        let times = |number| drawn.iter().filter(|n| **n == number).count() as f64;
        let ratio = times(1) / times(2);
        assert!((2.4..3.3).contains(&ratio), "2^1.5 = 2.83 expected between rank 1 and 2, got {ratio}");
    }

    #[test]
    fn random_exponential_and_gaussian_stay_in_bounds() {
        let drawn = draws("random_exponential(1, 100, 5.0)");
        assert!(drawn.iter().all(|n| (1..=100).contains(n)));
        let low = drawn.iter().filter(|n| **n <= 20).count();
        assert!((12_000..13_400).contains(&low), "(1 - e^-1) / (1 - e^-5) = 63.6 % below 20, got {low} of {DRAWS}");
        let drawn = draws("random_gaussian(1, 100, 2.5)");
        assert!(drawn.iter().all(|n| (1..=100).contains(n)));
        let middle = drawn.iter().filter(|n| (41..=60).contains(*n)).count();
        assert!((7_300..8_300).contains(&middle), "within half a deviation 38.8 %, got {middle} of {DRAWS}");
    }

    #[test]
    fn a_seed_repeats_the_same_numbers() {
        assert_eq!(draws("random(1, 1000000)"), draws("random(1, 1000000)"));
    }
}
