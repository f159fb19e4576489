package balancer

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"strings"
	"sync"
	"time"
	"unicode"
)

// TokenKey stands for a token without being one: a hash keyed by a secret of this
// process. The zero key stands for no token.
type TokenKey [16]byte

// Tokens remembers which tokens a backend has accepted of late, as keyed hashes,
// bounded in number. It only chooses connections; whether a token is good is
// kube-apiserver's to say, each time.
type Tokens struct {
	// Static after construction.
	secret [32]byte
	limit  int           // tokens in a generation
	span   time.Duration // of a generation; a token is remembered for one to two

	mu      sync.Mutex
	current map[TokenKey]struct{}
	before  map[TokenKey]struct{}
	turned  time.Time // when current began
}

// NewTokens remembers at most 2*limit tokens, each for one to two spans.
func NewTokens(limit int, span time.Duration) *Tokens {
	t := &Tokens{limit: limit, span: span, current: map[TokenKey]struct{}{}}
	rand.Read(t.secret[:]) // never fails, see crypto/rand
	return t
}

// Key returns the key that stands for the token, the same for each way of spelling it:
// whoever has one token would otherwise have as many as he likes.
func (t *Tokens) Key(token string) TokenKey {
	var room [2048]byte // as large as tokens are
	sum := sha256.Sum256(appendToken(append(room[:0], t.secret[:]...), token))
	return TokenKey(sum[:16])
}

// appendToken appends what a token says, which is itself unless it is a JWT. Of a JWT
// kube-apiserver takes white space away (stripWhitespace of go-jose), and decodes its three
// parts without a look at the last bits of each, which stand for nothing; it verifies what
// it has encoded again (computeAuthData of go-jose). Of the signature half counts: to one
// of ECDSA, which is r and s, there is another with the same r that is as good.
func appendToken(b []byte, token string) []byte {
	// A space itself ends a bearer token, and WebSocket's prove nothing (Concluded).
	blank := func(r rune) bool { return r != ' ' && unicode.IsSpace(r) }
	if strings.IndexFunc(token, blank) >= 0 {
		token = strings.Join(strings.FieldsFunc(token, blank), "")
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return append(b, token...)
	}
	jwt := append(b, "JWT"...)
	for i, part := range parts {
		part, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(part, "=")) // some take the padding, too
		if err != nil {
			return append(b, token...)
		}
		if i == 2 {
			part = part[:len(part)/2]
		}
		jwt = append(binary.BigEndian.AppendUint32(jwt, uint32(len(part))), part...) // #nosec G115 -- a header is smaller
	}
	return jwt
}

// Accept remembers that a backend accepted the token that k stands for.
func (t *Tokens) Accept(k TokenKey, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now)
	if _, known := t.current[k]; known || len(t.current) >= t.limit {
		return
	}
	t.current[k] = struct{}{}
}

// Forget is for a token that a backend has refused after all: it has expired, or
// was revoked, and must not go on drawing GOAWAYs on the connections of good ones.
func (t *Tokens) Forget(k TokenKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.current, k)
	delete(t.before, k)
}

// Accepted reports whether the token has been accepted of late, and whether that is so
// long ago that its next proof is to be remembered with Accept: the present generation
// does not know it.
func (t *Tokens) Accepted(k TokenKey, now time.Time) (accepted, renew bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now)
	if _, ok := t.current[k]; ok {
		return true, false
	}
	_, ok := t.before[k]
	return ok, ok
}

// turn begins a new generation when the current one is over.
func (t *Tokens) turn(now time.Time) {
	age := now.Sub(t.turned)
	if age < t.span {
		return
	}
	if age < 2*t.span {
		// It was over at the end of its span, whenever somebody asks.
		t.before, t.turned = t.current, t.turned.Add(t.span)
	} else {
		t.before, t.turned = nil, now
	}
	t.current = map[TokenKey]struct{}{}
}
