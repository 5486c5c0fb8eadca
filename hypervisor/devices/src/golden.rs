//! Saved states as text, so that a change of their format shows in a test.
//!
//! Every released version is read for ever: a field may be added, none may go, change its name or its type. Whoever has
//! to change a golden text in any other way gives the state a new version instead.

use crate::device::SavedBody;

/// A state in diagnostic notation (RFC 8949, section 8), a field per line. It tells apart what CBOR tells apart: a
/// number and the same digits as text, bytes and an array of numbers.
pub(crate) fn text_of(state: &SavedBody) -> String {
    let mut text = String::new();
    write(state, 0, &mut text);
    text.push('\n');
    text
}

/// `state` as it was written before it had `field`.
pub(crate) fn without(state: &SavedBody, field: &str) -> SavedBody {
    let SavedBody::Map(fields) = state else {
        panic!("a state is a map");
    };
    let older: Vec<_> = fields
        .iter()
        .filter(|(key, _)| key.as_text() != Some(field))
        .cloned()
        .collect();
    assert_eq!(older.len() + 1, fields.len(), "{field} is in the state");
    SavedBody::Map(older)
}

fn write(value: &SavedBody, depth: usize, text: &mut String) {
    match value {
        SavedBody::Null => text.push_str("null"),
        SavedBody::Bool(value) => text.push_str(&value.to_string()),
        SavedBody::Integer(value) => text.push_str(&i128::from(*value).to_string()),
        SavedBody::Float(value) => text.push_str(&format!("{value:?}")),
        SavedBody::Text(value) => text.push_str(&format!("{value:?}")),
        SavedBody::Bytes(bytes) => {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            text.push_str(&format!("h'{hex}'"));
        }
        SavedBody::Tag(tag, inner) => {
            text.push_str(&format!("{tag}("));
            write(inner, depth, text);
            text.push(')');
        }
        SavedBody::Array(values) => {
            text.push('[');
            for (nth, value) in values.iter().enumerate() {
                text.push_str(if nth == 0 { "" } else { ", " });
                write(value, depth, text);
            }
            text.push(']');
        }
        SavedBody::Map(fields) => {
            text.push_str("{\n");
            for (key, value) in fields {
                text.push_str(&"  ".repeat(depth + 1));
                write(key, depth + 1, text);
                text.push_str(": ");
                write(value, depth + 1, text);
                text.push_str(",\n");
            }
            text.push_str(&"  ".repeat(depth));
            text.push('}');
        }
        // The type may grow; nothing of ours is saved as anything else.
        other => panic!("{other:?} has no text"),
    }
}

#[test]
fn what_cbor_tells_apart_has_different_texts() {
    let map = |value: SavedBody| SavedBody::Map(vec![("field".into(), value)]);
    let bytes = SavedBody::Bytes(vec![1, 0xff]);
    let array = SavedBody::Array(vec![1.into(), 255.into()]);
    assert_eq!(text_of(&map(1.into())), "{\n  \"field\": 1,\n}\n");
    assert_eq!(text_of(&map("1".into())), "{\n  \"field\": \"1\",\n}\n");
    assert_eq!(text_of(&bytes), "h'01ff'\n");
    assert_eq!(text_of(&array), "[1, 255]\n");
    assert_eq!(text_of(&SavedBody::Null), "null\n");
}
