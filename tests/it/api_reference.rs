//! Writes `docs/api.md` from the proto files' comments, which the descriptor carries as source info.

use std::collections::HashMap;
use std::fmt::Write as _;

use nudged::api::proto::DESCRIPTOR;
use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};

const PACKAGE: &str = "nudged.v1";
/// Field numbers of the descriptor's own messages, of which source info's paths consist.
const FILE_MESSAGE: i32 = 4;
const FILE_ENUM: i32 = 5;
const FILE_SERVICE: i32 = 6;
const SERVICE_METHOD: i32 = 2;
const MESSAGE_FIELD: i32 = 2;
const MESSAGE_NESTED: i32 = 3;
const MESSAGE_ENUM: i32 = 4;
const MESSAGE_ONEOF: i32 = 8;
const ENUM_VALUE: i32 = 2;

/// Services first, in the order in which a reader needs the files.
const FILES: [&str; 4] = [
    "nudged/v1/push_service.proto",
    "nudged/v1/admin_service.proto",
    "nudged/v1/device.proto",
    "nudged/v1/event_type.proto",
];

pub fn markdown() -> String {
    let set = FileDescriptorSet::decode(DESCRIPTOR).unwrap();
    let ours: Vec<&FileDescriptorProto> = set.file.iter().filter(|file| file.package() == PACKAGE).collect();
    let mut files: Vec<&FileDescriptorProto> =
        FILES.iter().map(|name| *ours.iter().find(|file| file.name() == *name).unwrap()).collect();
    // A file that is new stands at the end until it is given a place.
    files.extend(ours.iter().filter(|file| !FILES.contains(&file.name())));

    let mut out = String::from(
        "# API reference\n\nPackage `nudged.v1`, made from the comments in `proto/nudged/v1` (`NUDGED_WRITE_DOCS=1 cargo \
         test --test it documents`);\nthe server has reflection. Errors: [errors.md](errors.md).\n",
    );
    let pages: Vec<Page> = files.iter().map(|file| Page::new(file)).collect();
    for page in &pages {
        page.services(&mut out);
    }
    out.push_str("\n## Messages\n");
    for page in &pages {
        for (at, message) in page.file.message_type.iter().enumerate() {
            page.message(&mut out, message, message.name(), &[FILE_MESSAGE, index(at)]);
        }
        for (at, one) in page.file.enum_type.iter().enumerate() {
            page.enumeration(&mut out, one, one.name(), &[FILE_ENUM, index(at)]);
        }
    }
    out
}

struct Page<'a> {
    file: &'a FileDescriptorProto,
    comments: HashMap<&'a [i32], &'a str>,
}

impl<'a> Page<'a> {
    fn new(file: &'a FileDescriptorProto) -> Self {
        let locations = file.source_code_info.as_ref().map_or(&[][..], |info| &info.location);
        let comments = locations.iter().filter(|location| location.leading_comments.is_some());
        let comments = comments.map(|location| (location.path.as_slice(), location.leading_comments())).collect();
        Self { file, comments }
    }

    /// The comment as Markdown, without the blank that follows `//`.
    fn comment(&self, path: &[i32]) -> String {
        let text = self.comments.get(path).unwrap_or_else(|| panic!("{} {path:?}: no comment", self.file.name()));
        let lines: Vec<&str> = text.lines().map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
        lines.join("\n").trim().to_owned()
    }

    fn services(&self, out: &mut String) {
        for (at, service) in self.file.service.iter().enumerate() {
            let path = [FILE_SERVICE, index(at)];
            write!(out, "\n## {}\n\n{}\n", service.name(), self.comment(&path)).unwrap();
            for (at, method) in service.method.iter().enumerate() {
                let text = self.comment(&[path[0], path[1], SERVICE_METHOD, index(at)]);
                let side =
                    |stream: bool, name: &str| format!("{}{}", if stream { "stream of " } else { "" }, type_link(name));
                write!(
                    out,
                    "\n### {}\n\n{} → {}\n\n{text}\n",
                    method.name(),
                    side(method.client_streaming(), method.input_type()),
                    side(method.server_streaming(), method.output_type()),
                )
                .unwrap();
            }
        }
    }

    fn message(&self, out: &mut String, message: &DescriptorProto, name: &str, path: &[i32]) {
        write!(out, "\n### {name}\n").unwrap();
        if self.comments.contains_key(path) {
            write!(out, "\n{}\n", self.comment(path)).unwrap();
        }
        if !message.field.is_empty() {
            out.push_str("\n| Field | Type | |\n|---|---|---|\n");
        }
        for (at, field) in message.field.iter().enumerate() {
            let mut text = self.comment(&below(path, MESSAGE_FIELD, at));
            if let (Some(oneof), false) = (field.oneof_index, field.proto3_optional()) {
                let said = self.comment(&below(path, MESSAGE_ONEOF, usize::try_from(oneof).unwrap()));
                let oneof = message.oneof_decl[usize::try_from(oneof).unwrap()].name();
                text = format!("One of `{oneof}` ({}). {text}", said.trim_end_matches('.'));
            }
            writeln!(out, "| `{}` | {} | {} |", field.name(), field_type(message, field), cell(&text)).unwrap();
        }
        for (at, one) in message.enum_type.iter().enumerate() {
            self.enumeration(out, one, &format!("{name}.{}", one.name()), &below(path, MESSAGE_ENUM, at));
        }
        for (at, nested) in message.nested_type.iter().enumerate() {
            if !nested.options.as_ref().is_some_and(prost_types::MessageOptions::map_entry) {
                let name = format!("{name}.{}", nested.name());
                self.message(out, nested, &name, &below(path, MESSAGE_NESTED, at));
            }
        }
    }

    fn enumeration(&self, out: &mut String, one: &EnumDescriptorProto, name: &str, path: &[i32]) {
        write!(out, "\n### {name}\n\n{}\n\n| Value | |\n|---|---|\n", self.comment(path)).unwrap();
        for (at, value) in one.value.iter().enumerate() {
            let path = below(path, ENUM_VALUE, at);
            let text = match (value.number(), self.comments.contains_key(path.as_slice())) {
                (0, false) => "Not said.".to_owned(),
                _ => self.comment(&path),
            };
            writeln!(out, "| `{}` | {} |", value.name(), cell(&text)).unwrap();
        }
    }
}

fn below(path: &[i32], kind: i32, at: usize) -> Vec<i32> {
    let mut path = path.to_vec();
    path.extend([kind, index(at)]);
    path
}

fn index(at: usize) -> i32 {
    i32::try_from(at).unwrap()
}

/// A table's cell: one line, without what would end it.
fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}

fn field_type(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let is_entry = |nested: &&DescriptorProto| {
        nested.options.as_ref().is_some_and(prost_types::MessageOptions::map_entry)
            && field.type_name().ends_with(&format!("{}.{}", message.name(), nested.name()))
    };
    if let Some(entry) = message.nested_type.iter().find(is_entry) {
        return format!("map of {} to {}", scalar(&entry.field[0]), scalar(&entry.field[1]));
    }
    match (field.label(), field.proto3_optional()) {
        (Label::Repeated, _) => format!("list of {}", scalar(field)),
        (_, true) => format!("optional {}", scalar(field)),
        _ => scalar(field),
    }
}

fn scalar(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => type_link(field.type_name()),
        other => other.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    }
}

/// Ours as a link to its heading, others by name.
fn type_link(name: &str) -> String {
    let name = name.trim_start_matches('.');
    match name.strip_prefix(&format!("{PACKAGE}.")) {
        Some(ours) => format!("[{ours}](#{})", ours.replace('.', "").to_lowercase()),
        None => name.to_owned(),
    }
}
