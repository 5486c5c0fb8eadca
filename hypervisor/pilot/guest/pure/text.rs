//! Text building without `core::fmt`, whose precompiled code uses vector instructions.

/// A line of text in a fixed buffer. What does not fit is dropped.
pub struct Text {
    bytes: [u8; Self::CAPACITY_BYTES],
    len: usize,
}

impl Text {
    /// Room for the longest reply: one counter for each of the most vCPUs.
    pub const CAPACITY_BYTES: usize = 2048;

    pub const fn new() -> Self {
        Self {
            bytes: [0; Self::CAPACITY_BYTES],
            len: 0,
        }
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub fn push(&mut self, text: &str) -> &mut Self {
        self.push_bytes(text.as_bytes())
    }

    pub fn push_bytes(&mut self, bytes: &[u8]) -> &mut Self {
        for &byte in bytes {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = byte;
                self.len += 1;
            }
        }
        self
    }

    /// Appends bytes from outside as printable ASCII, so that no reply ever holds a line end.
    pub fn push_printable(&mut self, bytes: &[u8]) -> &mut Self {
        for &byte in bytes {
            let shown = if matches!(byte, b' '..=b'~') {
                byte
            } else {
                b'?'
            };
            self.push_bytes(&[shown]);
        }
        self
    }

    pub fn push_decimal(&mut self, number: u64) -> &mut Self {
        let mut digits = [0_u8; 20];
        let mut start = digits.len();
        let mut rest = number;
        loop {
            start -= 1;
            digits[start] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.push_bytes(&digits[start..])
    }

    pub fn push_hex(&mut self, number: u64) -> &mut Self {
        self.push("0x");
        let digits = (64 - (number | 1).leading_zeros()).div_ceil(4);
        for digit in (0..digits).rev() {
            let nibble = (number >> (4 * digit)) as usize & 0xf;
            self.push_bytes(&[b"0123456789abcdef"[nibble]]);
        }
        self
    }

    /// Appends ` key=value`, or `key=value` at the start of the line.
    pub fn push_pair(&mut self, key: &str, value: u64) -> &mut Self {
        self.push_key(key).push_decimal(value)
    }

    /// Appends ` key=`, or `key=` at the start of the line.
    pub fn push_key(&mut self, key: &str) -> &mut Self {
        if self.len > 0 {
            self.push(" ");
        }
        self.push(key).push("=")
    }
}

/// Reads a decimal number made of nothing but digits; `None` when it is anything else or too big.
pub fn parse_decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    let mut number: u64 = 0;
    for &digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        number = number
            .checked_mul(10)?
            .checked_add(u64::from(digit - b'0'))?;
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text_of(build: impl Fn(&mut Text)) -> String {
        let mut text = Text::new();
        build(&mut text);
        String::from_utf8(text.as_bytes().to_vec()).expect("the test writes ASCII")
    }

    #[test]
    fn pairs_are_separated_by_one_space() {
        assert_eq!(
            text_of(|t| {
                t.push("ok").push_pair("a", 1).push_pair("b", 0);
            }),
            "ok a=1 b=0"
        );
        assert_eq!(
            text_of(|t| {
                t.push_pair("a", 1);
            }),
            "a=1"
        );
    }

    #[test]
    fn a_full_buffer_drops_the_rest() {
        let text = text_of(|t| {
            for _ in 0..Text::CAPACITY_BYTES {
                t.push("ab");
            }
        });
        assert_eq!(text.len(), Text::CAPACITY_BYTES);
    }

    #[test]
    fn control_bytes_never_reach_a_reply() {
        assert_eq!(
            text_of(|t| {
                t.push_printable(b"a\nb\x80");
            }),
            "a?b?"
        );
    }

    #[test]
    fn numbers_that_are_not_plain_decimals_are_refused() {
        for bad in ["", "-1", "+1", "1 ", "0x10", "18446744073709551616"] {
            assert_eq!(parse_decimal(bad.as_bytes()), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn numbers_print_as_the_standard_library_prints_them(number: u64) {
            prop_assert_eq!(text_of(|t| { t.push_decimal(number); }), number.to_string());
            prop_assert_eq!(text_of(|t| { t.push_hex(number); }), format!("{number:#x}"));
        }

        #[test]
        fn a_printed_number_is_read_back(number: u64) {
            prop_assert_eq!(parse_decimal(number.to_string().as_bytes()), Some(number));
        }
    }
}
