package balancer

import (
	"bytes"
	"encoding/base64"
	"slices"
	"strings"
	"testing"
	"time"
)

// Each spelling of a JWT that kube-apiserver takes has one key, and no other token has it.
func TestTokenSpellings(t *testing.T) {
	encode := base64.RawURLEncoding.EncodeToString
	jwt := func(header, payload string, signature []byte) string {
		return encode([]byte(header)) + "." + encode([]byte(payload)) + "." + encode(signature)
	}
	signature := bytes.Repeat([]byte{0xa5, 1, 2, 3}, 64)
	header, payload := `{"alg":"RS256"}x`, `{"iss":"kubernetes"}`
	token := jwt(header, payload, signature)
	parts := strings.Split(token, ".")
	// last spells the last character of a part in another way: of the bits that it stands for
	// none changes.
	last := func(part string) string {
		const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		return part[:len(part)-1] + string(digits[strings.IndexByte(digits, part[len(part)-1])^1])
	}
	tokens := NewTokens(10, time.Minute)
	key := tokens.Key(token)
	twin := slices.Clone(signature)
	for i := len(twin) / 2; i < len(twin); i++ {
		twin[i] ^= 0xff
	}
	for name, spelling := range map[string]string{
		"header":      last(parts[0]) + "." + parts[1] + "." + parts[2],
		"payload":     parts[0] + "." + last(parts[1]) + "." + parts[2],
		"signature":   parts[0] + "." + parts[1] + "." + last(parts[2]),
		"all":         last(parts[0]) + "." + last(parts[1]) + "." + last(parts[2]),
		"padding":     token + "==",
		"white space": "\t" + parts[0] + ".\v" + parts[1] + "." + parts[2] + "\u00a0\u2003",
		"ECDSA":       jwt(header, payload, twin),
	} {
		if spelling == token {
			t.Errorf("%s: this is the token itself", name)
		}
		if tokens.Key(spelling) != key {
			t.Errorf("%s: %q has another key", name, spelling)
		}
	}
	signature[0]++
	for name, other := range map[string]string{
		"signature": jwt(header, payload, signature),
		"header":    jwt(`{"alg":"RS512"}x`, payload, bytes.Repeat([]byte{0xa5, 1, 2, 3}, 64)),
		"moved":     jwt(header+payload[:1], payload[1:], bytes.Repeat([]byte{0xa5, 1, 2, 3}, 64)),
		"no base64": parts[0] + "." + parts[1] + "." + parts[2] + "*",
		"four":      token + ".",
		"two":       parts[0] + "." + parts[1],
	} {
		if tokens.Key(other) == key {
			t.Errorf("%s: %q has the same key", name, other)
		}
	}
}
