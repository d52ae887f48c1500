use proptest::prelude::*;

use super::*;

fn checked(email: &str) -> Result<(String, String), Vec<String>> {
    let mut found = Violations::default();
    let subject = check(&mut found, email, Normalization::Lowercase);
    let subject = subject.map(|subject| (subject.email.into_owned(), subject.user_id));
    match found.or_ok(()) {
        Ok(()) => Ok(subject.unwrap_or_default()),
        Err(found) => Err(found.iter().map(|one| one.reason.to_owned()).collect()),
    }
}

/// SHA-256 of the trimmed, lower-case address.
fn canonical_hash(email: &str) -> String {
    hex_digits(&Sha256::digest(email.trim().to_lowercase().as_bytes()))
}

#[test]
fn a_decomposed_address_is_that_of_its_composed_form() {
    for (decomposed, composed) in [
        // In the local part, in a label's middle, and at its end, where it was refused.
        ("rene\u{301}e@caf\u{e9}s.fr", "ren\u{e9}e@caf\u{e9}s.fr"),
        ("a@cafe\u{301}.fr", "a@caf\u{e9}.fr"),
        ("e\u{301}@u\u{308}ber.de", "\u{e9}@\u{fc}ber.de"),
        // Another order of the marks, Hangul, and a singleton: the Kelvin sign.
        ("q\u{307}\u{323}@b.com", "q\u{323}\u{307}@b.com"),
        ("\u{1112}\u{1161}\u{11ab}@b.kr", "\u{d55c}@b.kr"),
        ("\u{212a}@b.com", "K@b.com"),
    ] {
        let (email, user_id) = checked(decomposed).expect(decomposed);
        assert_eq!(email, composed);
        assert_eq!(user_id, canonical_hash(composed));
        assert_eq!(checked(composed), Ok((email, user_id)));
    }
    let mut found = Violations::default();
    let exact = check(&mut found, "E\u{301}@b.com", Normalization::Exact).expect("an address");
    assert_eq!(
        exact.user_id,
        hex_digits(&Sha256::digest("\u{c9}@b.com".as_bytes()))
    );
}

#[test]
fn no_character_stands_for_another_person_unseen() {
    let deceptive = [
        "\u{3164}\u{ffa0}\u{115f}\u{1160}", // Hangul fillers
        "\u{ad}\u{34f}\u{61c}\u{180e}\u{200b}\u{200c}\u{200d}\u{200e}\u{202e}",
        "\u{2060}\u{2064}\u{2065}\u{feff}\u{fe0f}\u{fff0}\u{e0001}\u{e0041}\u{e0100}\u{1d173}",
        "\u{17b4}\u{17b5}\u{180b}\u{180c}\u{180d}\u{180f}\u{fe00}\u{e0061}\u{e007f}\u{e01ef}",
        "\u{a0}\u{1680}\u{2003}\u{202f}\u{3000}\u{2028}\u{2029}\u{2800}\u{fff9}\u{85}",
        "\u{ff41}\u{ff21}\u{ff11}\u{ff20}\u{ff0e}\u{ff71}\u{ffe9}", // full and half width
        "\u{1f600}\u{2044}\u{b7}\u{ffff}\u{378}\u{e000}\u{f0000}",  // no word characters
        "\u{1d41a}\u{24d0}\u{1d43}\u{2070}\u{fb01}\u{fe8d}\u{2160}\u{bd}\u{fe52}\u{2024}",
    ];
    for character in deceptive.iter().flat_map(|text| text.chars()) {
        for email in [
            format!("an{character}n@example.com"),
            format!("{character}ann@example.com"),
            format!("ann@exa{character}mple.com"),
            format!("ann@{character}.com"),
            format!("\"an{character}n\"@example.com"),
        ] {
            // White space around an address is no part of it.
            let plain = email.trim() == "ann@example.com";
            let expected = if plain {
                checked("ann@example.com")
            } else {
                Err(vec!["INVALID_EMAIL".to_owned()])
            };
            assert_eq!(checked(&email), expected, "{:x}", u32::from(character));
        }
    }
    let whole = "\u{ff41}\u{ff4e}\u{ff4e}@\u{ff45}\u{ff58}.\u{ff43}\u{ff4f}\u{ff4d}";
    assert!(checked(whole).is_err());
}

#[test]
fn letters_and_marks_of_living_scripts_are_taken() {
    for email in [
        "\u{e19}\u{e49}\u{e33}@\u{e17}\u{e35}\u{e48}\u{e17}.th",
        "\u{eb3}\u{e9a}@b.la",
        "\u{430}\u{43d}\u{43d}\u{430}@\u{43f}\u{43e}\u{447}\u{442}\u{430}.\u{440}\u{444}",
        "\u{645}\u{62d}\u{645}\u{62f}@\u{628}\u{631}\u{64a}\u{62f}.com",
        "\u{5c71}\u{7530}@\u{65e5}\u{672c}.jp",
        "\u{915}\u{94d}\u{937}\u{93f}@b.in",
        "gro\u{df}@m\u{fc}ller.de",
    ] {
        assert_eq!(
            checked(email).expect(email),
            (email.to_owned(), canonical_hash(email))
        );
    }
}

#[test]
fn data_that_was_stored_under_former_rules_is_found() {
    let ids = user_ids(" Rene\u{301}e@b.com").expect("an address");
    assert_eq!(ids.len(), 4);
    assert_eq!(ids[0], canonical_hash("ren\u{e9}e@b.com"));
    assert!(ids.contains(&canonical_hash("rene\u{301}e@b.com")));
    let filler = user_ids("ann\u{3164}@b.com").expect("was an address once");
    assert_eq!(filler, [canonical_hash("ann\u{3164}@b.com")]);
    assert_eq!(user_ids("Ann@b.com").expect("an address").len(), 2);
    assert_eq!(user_ids("ann"), None);
}

#[test]
fn an_address_is_as_long_as_its_composed_form() {
    let local = "\u{1112}\u{1161}\u{11ab}".repeat(21);
    assert!(checked(&format!("{local}@b.kr")).is_ok());
    assert!(checked(&format!("{local}\u{1112}\u{1161}\u{11ab}@b.kr")).is_err());
    assert!(checked(&"e\u{301}".repeat(1_000_000)).is_err());
    // No composed form is shorter than a quarter of a decomposed one.
    for character in '\0'..=char::MAX {
        let text = character.to_string();
        let nfd = icu_normalizer::DecomposingNormalizerBorrowed::new_nfd();
        assert!(nfd.normalize(&text).len() <= 4 * text.len(), "{text:?}");
    }
}

fn decomposed(text: &str) -> String {
    icu_normalizer::DecomposingNormalizerBorrowed::new_nfd()
        .normalize(text)
        .into_owned()
}

proptest! {
    #[test]
    fn an_ascii_address_keeps_its_text_and_the_hash_that_everybody_computes(
        email in "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9]{1,20}\\.[A-Za-z]{2,10}"
    ) {
        let expected = (email.clone(), canonical_hash(&email));
        prop_assert_eq!(checked(&format!(" {email}\t")), Ok(expected));
        prop_assert_eq!(user_ids(&email).map(|ids| ids[0].clone()), Some(canonical_hash(&email)));
    }

    #[test]
    fn canonically_equivalent_addresses_are_one_person(
        local in "\\PC{1,12}", label in "[\\p{L}\\p{M}]{1,8}"
    ) {
        let email = format!("{local}@{label}x.com");
        prop_assert_eq!(checked(&email), checked(&decomposed(&email)));
    }

    #[test]
    fn what_is_taken_is_composed_and_has_one_compatible_form(
        local in "\\PC{1,12}", label in "[\\p{L}\\p{M}]{1,8}"
    ) {
        if let Ok((email, user_id)) = checked(&format!("{local}@{label}x.com")) {
            prop_assert_eq!(&canonical_hash(&email), &user_id);
            let nfc = ComposingNormalizerBorrowed::new_nfc();
            prop_assert_eq!(nfc.normalize(&email), email.as_str());
            let plain = email.replace(['\u{e33}', '\u{eb3}'], "");
            let nfkc = ComposingNormalizerBorrowed::new_nfkc();
            prop_assert_eq!(nfkc.normalize(&plain), plain.as_str());
        }
    }

    #[test]
    fn a_default_ignorable_character_is_refused_anywhere(place in 0..8_usize, pick: u32) {
        let ignorable: Vec<char> = CodePointSetData::new::<DefaultIgnorableCodePoint>()
            .iter_ranges()
            .flatten()
            .filter_map(char::from_u32)
            .collect();
        let mut email = "ann@b.com".to_owned();
        email.insert(place, ignorable[pick as usize % ignorable.len()]);
        prop_assert!(checked(&email).is_err());
    }
}
