//! The one encoding of a capture's content: known fields alone, in the order of their
//! numbers, maps sorted, nothing that is a default. The same bytes as prost writes.

use prost_types::Timestamp;

use super::{Answer, Attribute, Capture};

/// Room for what most captures take.
const TYPICAL_BYTES: usize = 512;

impl Capture<'_> {
    /// All but the capture's id, encoded: equal for equal content, however it was sent.
    #[must_use]
    pub fn canonical_content(&self) -> Vec<u8> {
        let mut out = Writer(Vec::with_capacity(TYPICAL_BYTES));
        for (number, text) in [
            (2, self.email),
            (3, self.campaign_id),
            (4, self.campaign_name),
            (5, self.session_id),
            (6, self.traffic_source),
        ] {
            if !text.is_empty() {
                out.text(number, text);
            }
        }
        if let Some(time) = &self.occur_time {
            out.time(7, time);
        }
        if self.data_region != 0 {
            out.varint_field(8, i64::from(self.data_region));
        }
        for attribute in &self.attributes {
            out.attribute(9, attribute);
        }
        for (category, given) in &self.consent {
            let length = text_entry_len(category) + if *given { 2 } else { 0 };
            out.head(10, length);
            if !category.is_empty() {
                out.text(1, category);
            }
            if *given {
                out.varint_field(2, 1);
            }
        }
        out.0
    }
}

/// Length of a varint.
fn varint_len(value: u64) -> usize {
    // Seven bits a byte, and at least one byte.
    ((70 - (value | 1).leading_zeros()) / 7) as usize
}

/// Length of a field of a one-byte key and so many bytes.
fn delimited_len(bytes: usize) -> usize {
    1 + varint_len(bytes as u64) + bytes
}

/// Length of a map's key, which is left out where it is empty.
fn text_entry_len(key: &str) -> usize {
    if key.is_empty() {
        0
    } else {
        delimited_len(key.len())
    }
}

fn time_len(time: &Timestamp) -> usize {
    let field = |value: i64| match value {
        0 => 0,
        value => 1 + varint_len(value as u64),
    };
    field(time.seconds) + field(time.nanos.into())
}

fn list_len(list: &[&str]) -> usize {
    list.iter().map(|text| delimited_len(text.len())).sum()
}

/// Length of an `AttributeValue`, which writes its one kind even where that is a default.
fn answer_len(answer: &Answer<'_>) -> usize {
    match answer {
        Answer::Text(text) => delimited_len(text.len()),
        Answer::Number(_) => 9,
        Answer::Integer(integer) => 1 + varint_len(*integer as u64),
        Answer::Bool(_) => 2,
        Answer::Time(time) => delimited_len(time_len(time)),
        Answer::List(list) => delimited_len(list_len(list)),
    }
}

/// Wire types of a key.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const DELIMITED: u8 = 2;

struct Writer(Vec<u8>);

impl Writer {
    /// All numbers of this schema fit into a key of one byte.
    fn key(&mut self, number: u8, wire: u8) {
        self.0.push(number << 3 | wire);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// Negative numbers take all ten bytes.
    fn varint_field(&mut self, number: u8, value: i64) {
        self.key(number, VARINT);
        self.varint(value as u64);
    }

    fn head(&mut self, number: u8, length: usize) {
        self.key(number, DELIMITED);
        self.varint(length as u64);
    }

    fn text(&mut self, number: u8, text: &str) {
        self.head(number, text.len());
        self.0.extend_from_slice(text.as_bytes());
    }

    fn time(&mut self, number: u8, time: &Timestamp) {
        self.head(number, time_len(time));
        if time.seconds != 0 {
            self.varint_field(1, time.seconds);
        }
        if time.nanos != 0 {
            self.varint_field(2, time.nanos.into());
        }
    }

    fn attribute(&mut self, number: u8, attribute: &Attribute<'_>) {
        let value = attribute.answer.as_ref().map(answer_len);
        self.head(
            number,
            text_entry_len(attribute.id) + value.map_or(0, delimited_len),
        );
        if !attribute.id.is_empty() {
            self.text(1, attribute.id);
        }
        if let (Some(length), Some(answer)) = (value, &attribute.answer) {
            self.head(2, length);
            self.answer(answer);
        }
    }

    fn answer(&mut self, answer: &Answer<'_>) {
        match answer {
            Answer::Text(text) => self.text(1, text),
            Answer::Number(number) => {
                self.key(2, FIXED64);
                self.0.extend_from_slice(&number.to_le_bytes());
            }
            Answer::Integer(integer) => self.varint_field(3, *integer),
            Answer::Bool(value) => self.varint_field(4, (*value).into()),
            Answer::Time(time) => self.time(5, time),
            Answer::List(list) => {
                self.head(6, list_len(list));
                for text in list {
                    self.text(1, text);
                }
            }
        }
    }
}
