//! Reads protobuf's wire format from a slice.
//! (<https://protobuf.dev/programming-guides/encoding/>)

use std::fmt;

/// Bytes that are no message of the schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub(super) &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed to decode Protobuf message: Capture: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

const UNDERFLOW: Malformed = Malformed("buffer underflow");
const BAD_VARINT: Malformed = Malformed("invalid varint");
const WRONG_WIRE_TYPE: Malformed = Malformed("invalid wire type");
const END_GROUP: Malformed = Malformed("unexpected end group tag");

/// How a field's value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    Varint,
    Fixed64,
    Delimited,
    StartGroup,
    EndGroup,
    Fixed32,
}

/// What is left to read of a message.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next field's number and how its value is written; `None` at the message's end.
    #[inline]
    pub(super) fn field(&mut self) -> Result<Option<(u32, Wire)>, Malformed> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = u32::try_from(self.raw_varint()?).map_err(|_| Malformed("invalid key value"))?;
        let wire = match key & 7 {
            0 => Wire::Varint,
            1 => Wire::Fixed64,
            2 => Wire::Delimited,
            3 => Wire::StartGroup,
            4 => Wire::EndGroup,
            5 => Wire::Fixed32,
            _ => return Err(WRONG_WIRE_TYPE),
        };
        match key >> 3 {
            0 => Err(Malformed("invalid tag value: 0")),
            number => Ok(Some((number, wire))),
        }
    }

    #[inline]
    fn raw_varint(&mut self) -> Result<u64, Malformed> {
        match self.0.split_first() {
            Some((&byte, rest)) if byte < 0x80 => {
                self.0 = rest;
                Ok(byte.into())
            }
            _ => self.long_varint(),
        }
    }

    fn long_varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        // Ten bytes hold 64 bits, and of the last one only one bit.
        for (place, &byte) in self.0.iter().take(10).enumerate() {
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte < 0x80 {
                if place == 9 && byte > 1 {
                    return Err(BAD_VARINT);
                }
                self.0 = &self.0[place + 1..];
                return Ok(value);
            }
        }
        Err(BAD_VARINT)
    }

    #[inline]
    fn take(&mut self, length: u64) -> Result<&'a [u8], Malformed> {
        let length = usize::try_from(length).map_err(|_| UNDERFLOW)?;
        let (taken, rest) = self.0.split_at_checked(length).ok_or(UNDERFLOW)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn varint(&mut self, wire: Wire) -> Result<u64, Malformed> {
        expect(wire, Wire::Varint)?;
        self.raw_varint()
    }

    pub(super) fn double(&mut self, wire: Wire) -> Result<f64, Malformed> {
        expect(wire, Wire::Fixed64)?;
        let (bytes, rest) = self.0.split_first_chunk().ok_or(UNDERFLOW)?;
        self.0 = rest;
        Ok(f64::from_le_bytes(*bytes))
    }

    #[inline]
    pub(super) fn text(&mut self, wire: Wire) -> Result<&'a str, Malformed> {
        let bytes = self.message(wire)?;
        std::str::from_utf8(bytes)
            .map_err(|_| Malformed("invalid string value: data is not UTF-8 encoded"))
    }

    #[inline]
    pub(super) fn message(&mut self, wire: Wire) -> Result<&'a [u8], Malformed> {
        expect(wire, Wire::Delimited)?;
        self.delimited()
    }

    #[inline]
    fn delimited(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.raw_varint()?;
        self.take(length)
    }

    /// Passes over a field that the schema does not know. `depth` is how deep groups in it
    /// may be nested.
    #[cold]
    pub(super) fn skip(&mut self, number: u32, wire: Wire, depth: u32) -> Result<(), Malformed> {
        let depth = depth
            .checked_sub(1)
            .ok_or(Malformed("recursion limit reached"))?;
        match wire {
            Wire::Varint => self.raw_varint().map(drop),
            Wire::Fixed64 => self.take(8).map(drop),
            Wire::Fixed32 => self.take(4).map(drop),
            Wire::Delimited => self.delimited().map(drop),
            Wire::EndGroup => Err(END_GROUP),
            Wire::StartGroup => loop {
                match self.field()? {
                    None => return Err(UNDERFLOW),
                    Some((end, Wire::EndGroup)) if end == number => return Ok(()),
                    Some((_, Wire::EndGroup)) => return Err(END_GROUP),
                    Some((inner, wire)) => self.skip(inner, wire, depth)?,
                }
            },
        }
    }
}

#[inline]
fn expect(wire: Wire, expected: Wire) -> Result<(), Malformed> {
    if wire == expected {
        Ok(())
    } else {
        Err(WRONG_WIRE_TYPE)
    }
}
