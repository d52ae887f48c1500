use super::*;

const KEPT: u64 = 4_096;

fn open(directory: &Path, applied: u64) -> (Journal, Vec<(u64, u8, Vec<u8>)>) {
    let (journal, found) = try_open(directory, applied, OnDamage::Refuse);
    (journal.expect("opens"), found)
}

type Opened = Result<Journal, JournalError>;

fn try_open(
    directory: &Path,
    applied: u64,
    on_damage: OnDamage,
) -> (Opened, Vec<(u64, u8, Vec<u8>)>) {
    let mut found = Vec::new();
    let journal = Journal::open(directory, applied, KEPT, on_damage, |record| {
        found.push((record.number, record.kind, record.body));
        Ok(())
    });
    (journal, found)
}

impl Journal {
    /// From now on the disk takes nothing.
    pub(in crate::outbox::sqlite) fn fail(&mut self) {
        for segment in &mut self.segments {
            // Not open for writing.
            segment.file = File::open("/dev/null").expect("opens");
        }
    }
}

fn write(journal: &mut Journal, bodies: &[&[u8]]) {
    for body in bodies {
        journal.push(7, &[body]);
    }
    journal.commit().expect("durable");
}

/// A new journal with these records in its first segment.
fn journal_with(directory: &Path, bodies: &[&[u8]]) -> Journal {
    let (mut journal, found) = open(directory, 0);
    assert_eq!(found, []);
    journal.restart();
    write(&mut journal, bodies);
    journal
}

fn numbers(directory: &Path, applied: u64) -> Vec<u64> {
    let (_, found) = open(directory, applied);
    found.into_iter().map(|(number, ..)| number).collect()
}

/// The segment that holds something.
fn written_segment(directory: &Path) -> std::path::PathBuf {
    (0..SEGMENTS)
        .map(|index| directory.join(format!("relay.journal-{index}")))
        .find(|path| path.metadata().is_ok_and(|known| known.len() > 0))
        .expect("a segment")
}

#[test]
fn records_come_back_in_order_over_all_segments_and_from_where_they_are_missing() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let mut journal = journal_with(path, &[b"one", b"two"]);
    assert!(journal.rotate());
    write(&mut journal, &[b"three"]);
    assert!(journal.rotate());
    write(&mut journal, &[b"", b"five"]);
    let (_, found) = open(path, 0);
    let expected: [(u64, u8, &[u8]); 5] = [
        (1, 7, b"one"),
        (2, 7, b"two"),
        (3, 7, b"three"),
        (4, 7, b""),
        (5, 7, b"five"),
    ];
    assert_eq!(
        found,
        expected.map(|(n, kind, body)| (n, kind, body.to_vec()))
    );
    assert_eq!(numbers(path, 3), [4, 5]);
    assert_eq!(numbers(path, 5), [0_u64; 0]);
    // What comes next has the next number, also where all is in the database.
    let (mut again, _) = open(path, 5);
    again.restart();
    write(&mut again, &[b"six"]);
    assert_eq!(numbers(path, 5), [6]);
}

#[test]
fn a_segment_is_used_again_only_once_it_is_free_and_shows_nothing_of_its_last_use() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let long = [b'x'; 1_000];
    let mut journal = journal_with(path, &[&long, &long, &long]);
    assert!(journal.rotate());
    write(&mut journal, &[b"four"]);
    assert!(journal.rotate());
    write(&mut journal, &[b"five"]);
    assert_eq!(journal.settled_through(), 3);
    assert!(!journal.rotate(), "what is not in the database is kept");
    journal.note_applied(3);
    assert!(journal.rotate());
    write(&mut journal, &[b"six"]);
    // Behind it stand whole records with older numbers.
    assert_eq!(numbers(path, 3), [4, 5, 6]);
}

/// Ends of records with bodies of these lengths behind a head.
fn ends(bodies: &[usize]) -> Vec<usize> {
    let mut end = HEAD_BYTES;
    let ends = bodies.iter().map(|body| {
        end += RECORD_HEAD_BYTES + body;
        end
    });
    ends.collect()
}

#[test]
fn a_last_group_that_was_cut_or_changed_costs_no_record_but_those_that_are_not_whole() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    drop(journal_with(path, &[b"one", b"two", b"three"]));
    let segment = written_segment(path);
    let whole = std::fs::read(&segment).expect("read");
    let ends = ends(&[3, 3, 5]);
    assert_eq!(whole.len(), ends[2]);
    for length in 0..=whole.len() {
        std::fs::write(&segment, &whole[..length]).expect("cut");
        let complete = ends.iter().filter(|end| **end <= length).count();
        assert_eq!(numbers(path, 0).len(), complete, "cut at {length}");
    }
    for place in 0..whole.len() {
        let mut changed = whole.clone();
        changed[place] ^= 0x10;
        std::fs::write(&segment, &changed).expect("changed");
        let broken = ends.iter().position(|end| place < *end);
        let broken = broken.filter(|_| place >= HEAD_BYTES);
        let expected: Vec<u64> = (0..3)
            .filter(|index| Some(*index) != broken)
            .map(|index| index as u64 + 1)
            .collect();
        assert_eq!(numbers(path, 0), expected, "changed at {place}");
    }
}

#[test]
fn damage_before_the_last_group_is_refused_and_once_accepted_costs_what_is_damaged_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let mut journal = journal_with(path, &[b"one", b"two"]);
    write(&mut journal, &[b"three", b"four"]);
    // The last group stands in another segment.
    assert!(journal.rotate());
    write(&mut journal, &[b"five"]);
    drop(journal);
    let segment = path.join(NAMES[1]);
    let whole = std::fs::read(&segment).expect("read");
    let ends = ends(&[3, 3, 5, 4]);
    assert_eq!(whole.len(), ends[3]);
    let refused = |applied| match try_open(path, applied, OnDamage::Refuse) {
        (Err(JournalError::Damaged(count)), found) if found.is_empty() => count,
        other => panic!("{other:?}"),
    };
    for place in HEAD_BYTES..whole.len() {
        let mut changed = whole.clone();
        changed[place] ^= 0x10;
        std::fs::write(&segment, &changed).expect("changed");
        let broken = ends.iter().position(|end| place < *end).expect("one") as u64 + 1;
        assert_eq!(refused(0), 1, "changed at {place}");
        assert_eq!(std::fs::read(&segment).expect("read"), changed);
        // What is in the database already may be damaged here.
        assert_eq!(numbers(path, broken).len() as u64, 5 - broken);
    }
    std::fs::write(&segment, vec![0; whole.len()]).expect("emptied");
    assert_eq!((refused(0), refused(3)), (4, 1));
    let mut torn = whole.clone();
    torn[ends[0]..ends[2]].fill(0);
    std::fs::write(&segment, &torn).expect("torn");
    assert_eq!(refused(0), 2);
    let (journal, found) = try_open(path, 0, OnDamage::Accept);
    let found: Vec<u64> = found.into_iter().map(|(number, ..)| number).collect();
    assert_eq!((found, journal.expect("opens").last()), (vec![1, 4, 5], 5));
    let kept = std::fs::read_dir(path).expect("listed").filter(|file| {
        let path = file.as_ref().expect("a file").path();
        path.to_string_lossy().contains("journal-1.damaged-")
            && std::fs::read(path).expect("read") == torn
    });
    assert_eq!(kept.count(), 1);
}

#[test]
fn a_journal_without_its_head_or_with_bytes_between_records_is_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let mut journal = journal_with(path, &[b"one"]);
    write(&mut journal, &[b"two"]);
    drop(journal);
    let segment = path.join(NAMES[1]);
    let whole = std::fs::read(&segment).expect("read");
    let mut changed = whole.clone();
    changed[..HEAD_BYTES].fill(0xff);
    changed.splice(ends(&[3])[0]..ends(&[3])[0], *b"something else");
    std::fs::write(&segment, &changed).expect("changed");
    assert_eq!(numbers(path, 0), [1, 2]);
}

#[test]
fn a_file_that_is_missing_beside_a_database_and_a_journal_without_one_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    prepare(path, OnDamage::Refuse).expect("a new store");
    assert!(NAMES.iter().all(|name| path.join(name).exists()));
    drop(journal_with(path, &[b"one"]));
    for database in [None, Some("")] {
        if let Some(content) = database {
            std::fs::write(path.join("relay.db"), content).expect("written");
        }
        let refused = prepare(path, OnDamage::Refuse);
        assert!(matches!(refused, Err(JournalError::NoDatabase(_))));
        // There is nothing that it could be accepted for.
        let refused = prepare(path, OnDamage::Accept);
        assert!(matches!(refused, Err(JournalError::NoDatabase(_))));
    }
    std::fs::write(path.join("relay.db"), "content").expect("written");
    prepare(path, OnDamage::Refuse).expect("whole");
    std::fs::remove_file(path.join(NAMES[2])).expect("removed");
    let refused = prepare(path, OnDamage::Refuse);
    assert!(matches!(refused, Err(JournalError::Missing(_))));
    assert!(!path.join(NAMES[2]).exists(), "nothing is changed");
    prepare(path, OnDamage::Accept).expect("accepted");
    prepare(path, OnDamage::Refuse).expect("whole again");
}

#[test]
fn a_group_that_is_taken_back_leaves_nothing_also_as_the_first_of_a_segment() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let (mut journal, _) = open(path, 0);
    journal.restart();
    journal.push(7, &[b"refused"]);
    journal.forget_group();
    write(&mut journal, &[b"one"]);
    journal.push(7, &[b"refused"]);
    journal.forget_group();
    write(&mut journal, &[b"two"]);
    let (_, found) = open(path, 0);
    let bodies: Vec<_> = found.into_iter().map(|(_, _, body)| body).collect();
    assert_eq!(bodies, [b"one".to_vec(), b"two".to_vec()]);
}

#[test]
fn after_a_failed_write_nothing_is_taken_until_all_is_in_the_database() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let mut journal = journal_with(path, &[b"one"]);
    let active = journal.active;
    let writable = journal.segments[active].file.try_clone().expect("cloned");
    // A handle that can't be written stands for a disk that can't.
    journal.segments[active].file = File::open(written_segment(path)).expect("opened");
    journal.push(7, &[b"refused"]);
    assert!(journal.commit().is_err());
    journal.segments[active].file = writable;
    assert!(journal.is_broken() && !journal.rotate());
    journal.push(7, &[b"refused"]);
    assert!(
        journal.commit().is_err(),
        "a sync that works now proves nothing"
    );
    assert_eq!(numbers(path, 0), [1]);
    journal.restart();
    write(&mut journal, &[b"two"]);
    assert_eq!(numbers(path, 1), [2]);
}

#[test]
fn what_is_free_is_written_over_with_zeros_and_what_is_not_stays() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let planted = |directory: &Path| {
        let files = std::fs::read_dir(directory).expect("listed");
        files
            .map(|file| std::fs::read(file.expect("a file").path()).expect("read"))
            .filter(|content| content.windows(7).any(|part| part == b"planted"))
            .count()
    };
    let long = b"planted ".repeat(2_000);
    let mut journal = journal_with(path, &[&long]);
    assert!(!journal.has_leftovers());
    assert!(journal.rotate());
    write(&mut journal, &[b"planted"]);
    journal.erase_free().expect("erased");
    assert_eq!(planted(path), 2);
    journal.note_applied(1);
    assert!(journal.has_leftovers());
    journal.erase_free().expect("erased");
    assert_eq!(planted(path), 1);
    assert!(!journal.has_leftovers());
    assert_eq!(numbers(path, 1), [2]);
    journal.note_applied(2);
    journal.erase().expect("erased");
    journal.restart();
    assert_eq!(planted(path), 0);
    let sizes = std::fs::read_dir(path).expect("listed");
    let sizes = sizes.map(|file| file.expect("a file").metadata().expect("known").len());
    assert_eq!(sizes.sum::<u64>(), 0);
}
