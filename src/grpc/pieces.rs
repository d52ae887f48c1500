//! Long work in pieces: whoever else has something to do on a runtime's thread has a turn
//! between them.

/// Items of a piece: with captures about a tenth of a millisecond.
const PIECE: usize = 16;

/// Does `work` with each item, and lets others have their turn after every piece.
pub(super) async fn in_pieces<T>(items: impl IntoIterator<Item = T>, mut work: impl FnMut(T)) {
    for (place, item) in items.into_iter().enumerate() {
        if place > 0 && place.is_multiple_of(PIECE) {
            tokio::task::yield_now().await;
        }
        work(item);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test]
    async fn others_have_a_turn_after_every_piece() {
        let (done, items) = (RefCell::new(Vec::new()), 2 * PIECE + 1);
        // How much is done whenever the other one has its turn.
        let other = async {
            let mut seen = Vec::new();
            while done.borrow().len() < items {
                seen.push(done.borrow().len());
                tokio::task::yield_now().await;
            }
            seen
        };
        let work = in_pieces(0..items, |item| done.borrow_mut().push(item));
        let ((), seen) = tokio::join!(biased; work, other);
        assert_eq!(seen, [PIECE, 2 * PIECE]);
        assert_eq!(*done.borrow(), (0..items).collect::<Vec<_>>());
    }
}
