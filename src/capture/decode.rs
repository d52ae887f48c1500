//! From the wire to a [`Capture`].

use prost_types::Timestamp;

use super::{
    Answer, Attribute, Capture,
    reader::{Malformed, Reader},
};

/// How deep groups may be nested in the unknown fields of a capture: prost's limit of 100 for
/// a request, less one for each message around them.
const DEPTH: u32 = 99;
const ENTRY_DEPTH: u32 = DEPTH - 1;
const VALUE_DEPTH: u32 = ENTRY_DEPTH - 1;
/// Room that the first attribute makes for others.
const TYPICAL_ATTRIBUTES: usize = 12;

/// Decodes a capture. It may come in several pieces: a message's field that occurs more than
/// once is one message, as if the bytes of all its occurrences stood one after the other.
///
/// # Errors
/// The bytes are no capture.
pub fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Capture<'a>, Malformed> {
    let mut capture = Capture::default();
    for bytes in pieces {
        merge(&mut capture, Reader::new(bytes))?;
    }
    sort_last_wins(&mut capture.attributes, |attribute| attribute.id);
    sort_last_wins(&mut capture.consent, |(category, _)| category);
    Ok(capture)
}

fn merge<'a>(capture: &mut Capture<'a>, mut reader: Reader<'a>) -> Result<(), Malformed> {
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => capture.capture_id = reader.text(wire)?,
            2 => capture.email = reader.text(wire)?,
            3 => capture.campaign_id = reader.text(wire)?,
            4 => capture.campaign_name = reader.text(wire)?,
            5 => capture.session_id = reader.text(wire)?,
            6 => capture.traffic_source = reader.text(wire)?,
            7 => {
                let time = capture.occur_time.get_or_insert_default();
                merge_time(time, Reader::new(reader.message(wire)?), ENTRY_DEPTH)?;
            }
            8 => capture.data_region = reader.varint(wire)? as i32,
            9 => {
                if capture.attributes.is_empty() {
                    capture.attributes.reserve(TYPICAL_ATTRIBUTES);
                }
                let entry = attribute(Reader::new(reader.message(wire)?))?;
                capture.attributes.push(entry);
            }
            10 => {
                let entry = consent(Reader::new(reader.message(wire)?))?;
                capture.consent.push(entry);
            }
            _ => reader.skip(number, wire, DEPTH)?,
        }
    }
    Ok(())
}

fn attribute<'a>(mut reader: Reader<'a>) -> Result<Attribute<'a>, Malformed> {
    let mut attribute = Attribute {
        id: "",
        answer: None,
    };
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => attribute.id = reader.text(wire)?,
            2 => merge_answer(&mut attribute.answer, Reader::new(reader.message(wire)?))?,
            _ => reader.skip(number, wire, ENTRY_DEPTH)?,
        }
    }
    Ok(attribute)
}

fn merge_answer<'a>(
    answer: &mut Option<Answer<'a>>,
    mut reader: Reader<'a>,
) -> Result<(), Malformed> {
    while let Some((number, wire)) = reader.field()? {
        *answer = Some(match number {
            1 => Answer::Text(reader.text(wire)?),
            2 => Answer::Number(reader.double(wire)?),
            3 => Answer::Integer(reader.varint(wire)? as i64),
            4 => Answer::Bool(reader.varint(wire)? != 0),
            5 => {
                let mut time = match answer {
                    Some(Answer::Time(time)) => *time,
                    _ => Timestamp::default(),
                };
                merge_time(
                    &mut time,
                    Reader::new(reader.message(wire)?),
                    VALUE_DEPTH - 1,
                )?;
                Answer::Time(time)
            }
            6 => {
                let mut list = match answer.take() {
                    Some(Answer::List(list)) => list,
                    _ => Vec::new(),
                };
                merge_list(&mut list, Reader::new(reader.message(wire)?))?;
                Answer::List(list)
            }
            _ => {
                reader.skip(number, wire, VALUE_DEPTH)?;
                continue;
            }
        });
    }
    Ok(())
}

fn merge_list<'a>(list: &mut Vec<&'a str>, mut reader: Reader<'a>) -> Result<(), Malformed> {
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => list.push(reader.text(wire)?),
            _ => reader.skip(number, wire, VALUE_DEPTH - 1)?,
        }
    }
    Ok(())
}

fn merge_time(time: &mut Timestamp, mut reader: Reader<'_>, depth: u32) -> Result<(), Malformed> {
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => time.seconds = reader.varint(wire)? as i64,
            2 => time.nanos = reader.varint(wire)? as i32,
            _ => reader.skip(number, wire, depth)?,
        }
    }
    Ok(())
}

fn consent<'a>(mut reader: Reader<'a>) -> Result<(&'a str, bool), Malformed> {
    let (mut category, mut given) = ("", false);
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => category = reader.text(wire)?,
            2 => given = reader.varint(wire)? != 0,
            _ => reader.skip(number, wire, ENTRY_DEPTH)?,
        }
    }
    Ok((category, given))
}

/// Brings a map's entries into the order of their keys. Of several with one key the last
/// one stays.
fn sort_last_wins<'a, T>(entries: &mut Vec<T>, key: impl Fn(&T) -> &'a str) {
    // Many clients write maps sorted.
    if entries.is_sorted_by(|a, b| key(a) < key(b)) {
        return;
    }
    // Keeps the order of those with one key.
    entries.sort_by(|a, b| key(a).cmp(key(b)));
    entries.dedup_by(|later, earlier| {
        let same = key(later) == key(earlier);
        if same {
            std::mem::swap(later, earlier);
        }
        same
    });
}
