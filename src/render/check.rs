//! Reads a template before it is stored: only the part of the language that cannot surprise at send time is taken, and
//! every name in it must be known.
//!
//! The engine looks filters up when it renders, so a misspelt one in a branch that is seldom taken would be found on the
//! day it matters. This walk over the parsed template finds it at once.

use std::collections::BTreeSet;

use minijinja::machinery::ast::{CallArg, Expr, Stmt};
use minijinja::machinery::{Span, parse};

use super::filters::{FILTERS, Signature, TESTS};
use super::josa::{PARTICLES, Particle};

/// What a template can read. Texts are rendered once per language, not per person: nothing here is the recipient's.
pub const VARIABLES: [&str; 5] = ["data", "actor", "subject", "event_type", "locale"];

/// What the walk found out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// Something is to be filled in; otherwise the source is the text.
    pub dynamic: bool,
    /// Which of [`VARIABLES`] it reads.
    pub reads: BTreeSet<&'static str>,
}

/// Every error of the template, each as one sentence with its line.
pub fn check(source: &str) -> Result<Facts, Vec<String>> {
    if !["{{", "{%", "{#"].iter().any(|mark| source.contains(mark)) {
        return Ok(Facts::default());
    }
    let tree = parse(source, "template", minijinja::syntax::SyntaxConfig::default())
        .map_err(|error| vec![describe(&error)])?;
    let mut walk = Walk {
        facts: Facts { dynamic: true, ..Facts::default() },
        locals: BTreeSet::new(),
        literals: 0,
        errors: vec![],
    };
    walk.statement(&tree);
    if walk.errors.is_empty() { Ok(walk.facts) } else { Err(walk.errors) }
}

/// The engine's error as one sentence.
#[must_use]
pub fn describe(error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    match error.detail() {
        Some(detail) => format!("{line}{}: {detail}", error.kind()),
        None => format!("{line}{}", error.kind()),
    }
}

struct Walk<'a> {
    facts: Facts,
    /// Names the template gave itself. Scopes are not told apart: a name used outside its scope is merely empty.
    locals: BTreeSet<&'a str>,
    /// How many lists and maps written in the template we are in.
    literals: usize,
    errors: Vec<String>,
}

impl<'a> Walk<'a> {
    fn refuse(&mut self, span: Span, what: impl std::fmt::Display) {
        self.errors.push(format!("line {}: {what}", span.start_line));
    }

    fn body(&mut self, statements: &[Stmt<'a>]) {
        for statement in statements {
            self.statement(statement);
        }
    }

    fn statement(&mut self, statement: &Stmt<'a>) {
        match statement {
            Stmt::Template(template) => self.body(&template.children),
            Stmt::EmitExpr(emit) => self.expression(&emit.expr),
            Stmt::EmitRaw(_) => {}
            Stmt::ForLoop(each) => {
                if each.recursive {
                    self.refuse(each.span(), "recursive loops are not supported");
                }
                self.expression(&each.iter);
                self.assign(&each.target);
                self.locals.insert("loop");
                self.optional(each.filter_expr.as_ref());
                self.body(&each.body);
                self.body(&each.else_body);
            }
            Stmt::IfCond(cond) => {
                self.expression(&cond.expr);
                self.body(&cond.true_body);
                self.body(&cond.false_body);
            }
            Stmt::Set(set) => {
                self.expression(&set.expr);
                self.assign(&set.target);
            }
            Stmt::WithBlock(with) => {
                for (target, value) in &with.assignments {
                    self.expression(value);
                    self.assign(target);
                }
                self.body(&with.body);
            }
            Stmt::SetBlock(set) => self.refuse(set.span(), "{% set %} needs a value: {% set name = … %}"),
            Stmt::AutoEscape(escape) => {
                self.refuse(escape.span(), "{% autoescape %} is not supported: texts are plain");
            }
            Stmt::FilterBlock(block) => self.refuse(block.span(), "{% filter %} is not supported"),
            Stmt::Do(call) => self.refuse(call.span(), "{% do %} is not supported"),
        }
    }

    fn assign(&mut self, target: &Expr<'a>) {
        match target {
            Expr::Var(name) => {
                if VARIABLES.contains(&name.id) {
                    self.refuse(name.span(), format_args!("`{}` cannot be given another value", name.id));
                }
                self.locals.insert(name.id);
            }
            Expr::List(names) => names.items.iter().for_each(|name| self.assign(name)),
            Expr::Tuple(names) => names.items.iter().for_each(|name| self.assign(name)),
            other => self.refuse(other.span(), "only names can be given a value"),
        }
    }

    fn optional(&mut self, expression: Option<&Expr<'a>>) {
        if let Some(expression) = expression {
            self.expression(expression);
        }
    }

    fn expression(&mut self, expression: &Expr<'a>) {
        match expression {
            Expr::Var(name) => self.variable(name.id, name.span()),
            Expr::Const(_) => {}
            Expr::Slice(slice) => {
                self.expression(&slice.expr);
                self.optional(slice.start.as_ref());
                self.optional(slice.stop.as_ref());
                self.optional(slice.step.as_ref());
            }
            Expr::UnaryOp(op) => self.expression(&op.expr),
            Expr::BinOp(op) => {
                self.expression(&op.left);
                self.expression(&op.right);
            }
            Expr::Compare(compare) => {
                self.expression(&compare.expr);
                compare.ops.iter().for_each(|op| self.expression(&op.expr));
            }
            Expr::IfExpr(cond) => {
                self.expression(&cond.test_expr);
                self.expression(&cond.true_expr);
                self.optional(cond.false_expr.as_ref());
            }
            Expr::Filter(filter) => {
                self.optional(filter.expr.as_ref());
                self.call("filter", FILTERS, filter.name, &filter.args, filter.span());
                if matches!(filter.name, "josa" | "particle") {
                    self.particle(&filter.args, filter.span());
                }
            }
            Expr::Test(test) => {
                self.expression(&test.expr);
                self.call("test", TESTS, test.name, &test.args, test.span());
            }
            Expr::GetAttr(attribute) => self.expression(&attribute.expr),
            Expr::GetItem(item) => {
                self.expression(&item.expr);
                self.expression(&item.subscript_expr);
            }
            Expr::Call(call) => {
                self.refuse(call.span(), "there is nothing to call: use a filter, as in {{ name|upper }}");
            }
            Expr::List(list) => self.literal(list.items.iter()),
            Expr::Tuple(tuple) => self.literal(tuple.items.iter()),
            Expr::Map(map) => self.literal(map.keys.iter().chain(&map.values)),
        }
    }

    /// A list of lists by name doubles with every line: thirty lines are a billion items, which the engine's fuel does not
    /// see where they are compared or shown.
    fn literal<'e>(&mut self, items: impl Iterator<Item = &'e Expr<'a>>)
    where
        'a: 'e,
    {
        self.literals += 1;
        items.for_each(|item| self.expression(item));
        self.literals -= 1;
    }

    fn variable(&mut self, name: &'a str, span: Span) {
        if let Some(known) = VARIABLES.into_iter().find(|known| *known == name) {
            self.facts.reads.insert(known);
        } else if matches!(name, "user" | "user_id") {
            self.refuse(span, format_args!("`{name}` is unknown: a text is written once per language, not per person"));
        } else if self.literals > 0 && self.locals.contains(name) {
            self.refuse(span, format_args!("`{name}` cannot be put into a list or map: it is the template's own name"));
        } else if !self.locals.contains(name) {
            self.refuse(
                span,
                format_args!(
                    "variable `{name}` is unknown: there are {}; the event's own are `data.{name}`",
                    VARIABLES.join(", ")
                ),
            );
        }
    }

    fn call(&mut self, kind: &str, known: &[Signature], name: &str, args: &[CallArg<'a>], span: Span) {
        for arg in args {
            match arg {
                CallArg::Pos(value) => self.expression(value),
                CallArg::Kwarg(..) | CallArg::PosSplat(_) | CallArg::KwargSplat(_) => {
                    self.refuse(span, format_args!("{kind} `{name}` takes plain arguments only"));
                }
            }
        }
        let Some(signature) = known.iter().find(|signature| signature.name == name) else {
            let nearest = known
                .iter()
                .map(|signature| (strsim::damerau_levenshtein(signature.name, name), signature.name))
                .min()
                .filter(|(distance, _)| *distance <= 3)
                .map(|(_, nearest)| format!(", did you mean `{nearest}`?"))
                .unwrap_or_default();
            self.refuse(span, format_args!("{kind} `{name}` is unknown{nearest}"));
            return;
        };
        if !(signature.least..=signature.most).contains(&args.len()) {
            let wanted = if signature.least == signature.most {
                signature.least.to_string()
            } else {
                format!("{} to {}", signature.least, signature.most)
            };
            self.refuse(span, format_args!("{kind} `{name}` takes {wanted} arguments, not {}", args.len()));
        }
    }

    fn particle(&mut self, args: &[CallArg<'a>], span: Span) {
        let [CallArg::Pos(Expr::Const(particle))] = args else {
            if args.len() == 1 {
                self.refuse(span, "the particle must be written out, as in josa(\"이/가\")");
            }
            return;
        };
        if particle.value.as_str().and_then(Particle::named).is_none() {
            let known: Vec<String> = PARTICLES.iter().map(|p| format!("{}/{}", p.closed, p.open)).collect();
            self.refuse(span, format_args!("particle {} is unknown: there are {}", particle.value, known.join(", ")));
        }
    }
}
