//! Which monthly partition an id belongs to: UUIDv7 ids begin with their milliseconds since the epoch.

use jiff::{civil::Date, tz::TimeZone};
use uuid::Uuid;

/// One month of partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Month {
    year: i16,
    month: i8,
}

impl Month {
    /// The month of an id; `None` for ids that are no UUIDv7 of this or the next century, which have no partition of
    /// their own.
    pub(super) fn of(id: Uuid) -> Option<Self> {
        if id.get_version_num() != 7 {
            return None;
        }
        let millis = (id.as_u128() >> 80) as i64;
        let date = jiff::Timestamp::from_millisecond(millis).ok()?.to_zoned(TimeZone::UTC).date();
        (2000..2200).contains(&date.year()).then(|| Self { year: date.year(), month: date.month() })
    }

    /// `2026_11`.
    pub(super) fn name(self) -> String {
        format!("{:04}_{:02}", self.year, self.month)
    }

    /// The least id of the month, and the least id past it.
    pub(super) fn range(self) -> (Uuid, Uuid) {
        let next = if self.month == 12 {
            Self { year: self.year + 1, month: 1 }
        } else {
            Self { year: self.year, month: self.month + 1 }
        };
        (self.least(), next.least())
    }

    fn least(self) -> Uuid {
        let start = Date::new(self.year, self.month, 1).ok().and_then(|date| date.to_zoned(TimeZone::UTC).ok());
        let millis = start.map_or(0, |start| start.timestamp().as_millisecond());
        Uuid::from_u128((millis as u128) << 80)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Uuid {
        let millis = text.parse::<jiff::Timestamp>().unwrap().as_millisecond() as u128;
        Uuid::from_u128((millis << 80) | (7 << 76) | (2 << 62) | 12345)
    }

    #[test]
    fn ids_fall_into_the_month_of_their_time() {
        for (time, name) in [
            ("2026-11-23T09:00:00Z", "2026_11"),
            ("2026-11-30T23:59:59.999Z", "2026_11"),
            ("2026-12-01T00:00:00Z", "2026_12"),
            ("2026-12-31T23:59:59.999Z", "2026_12"),
            ("2027-01-01T00:00:00Z", "2027_01"),
        ] {
            let month = Month::of(at(time)).unwrap();
            assert_eq!(month.name(), name);
            let (first, past) = month.range();
            assert!(first <= at(time) && at(time) < past, "{time}");
        }
        assert_eq!(Month::of(Uuid::nil()), None);
        assert_eq!(Month::of(Uuid::max()), None);
        assert_eq!(Month::of(at("1999-12-31T00:00:00Z")), None);
        let month = Month::of(at("2026-12-05T00:00:00Z")).unwrap();
        assert_eq!(Month::of(at("2027-01-01T00:00:00Z")).unwrap().range().0, month.range().1);
    }
}
