//! The two regions in which Segment keeps data. What belongs to one never
//! reaches the endpoint of the other.

use std::fmt;

use crate::proto::DataRegion;

/// A region that has been decided; the contract's "unspecified" is resolved
/// when a capture is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Region {
    /// Outside the EU (Oregon).
    NonEu,
    /// In the EU (Dublin).
    Eu,
}

impl Region {
    /// Both regions.
    pub const ALL: [Self; 2] = [Self::NonEu, Self::Eu];

    /// Its word in labels.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NonEu => "non_eu",
            Self::Eu => "eu",
        }
    }

    /// The schema's value; `None` for unspecified.
    #[must_use]
    pub fn from_proto(region: DataRegion) -> Option<Self> {
        match region {
            DataRegion::Unspecified => None,
            DataRegion::NonEu => Some(Self::NonEu),
            DataRegion::Eu => Some(Self::Eu),
        }
    }

    /// The schema's value.
    #[must_use]
    pub fn to_proto(self) -> DataRegion {
        match self {
            Self::NonEu => DataRegion::NonEu,
            Self::Eu => DataRegion::Eu,
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NonEu => "non-EU",
            Self::Eu => "EU",
        })
    }
}

/// One value for each region. There is no way to ask for "any" of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PerRegion<T> {
    /// The value of [`Region::NonEu`].
    pub non_eu: T,
    /// The value of [`Region::Eu`].
    pub eu: T,
}

impl<T> PerRegion<T> {
    /// The value of `region`.
    pub fn get(&self, region: Region) -> &T {
        match region {
            Region::NonEu => &self.non_eu,
            Region::Eu => &self.eu,
        }
    }

    /// The value of `region`, to change.
    pub fn get_mut(&mut self, region: Region) -> &mut T {
        match region {
            Region::NonEu => &mut self.non_eu,
            Region::Eu => &mut self.eu,
        }
    }
}
