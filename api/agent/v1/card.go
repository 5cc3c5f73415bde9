package agentv1

// CardPrefix are the first five bytes of the hardware address with which a
// card of the VM begins; the sixth is the card's number. It is locally
// administered and never seen on a wire: a card that is used is given the
// address that it is to have there.
const CardPrefix = "\x02rv\x00\x00"

// CardAddress is the hardware address with which a card begins.
func CardAddress(slot int) []byte { return append([]byte(CardPrefix), byte(slot)) }

// MaxCards bounds the cards of a VM.
const MaxCards = 16
