package balancer

import (
	"encoding/base64"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestBearerToken(t *testing.T) {
	tests := []struct{ authorization, want string }{
		{"", ""},
		{"Bearer abc", "abc"},
		{"bearer abc", "abc"},
		{"BEARER abc", "abc"},
		{"bEaReR abc", "abc"},
		{"  Bearer abc  ", "abc"},
		{"\tBearer abc", "abc"},
		{"Bearer abc def", "abc"},
		{"Bearer abc def ghi", "abc"},
		{"Bearer abc\tdef", "abc\tdef"},
		{"Bearer", ""},
		{"Bearer ", ""},
		{"Bearer  abc", ""}, // kube-apiserver warns of the extra space and takes none
		{"Bearer\tabc", ""},
		{"Bearerabc", ""},
		{"Bearer: abc", ""},
		{"Basic dXNlcjpwYXNz", ""},
		{"Negotiate abc", ""},
		{"abc", ""},
		{"Bearer eyJh.eyJz.c2ln", "eyJh.eyJz.c2ln"},
		{"Bearer base64url.bearer.authorization.k8s.io.YQ", "base64url.bearer.authorization.k8s.io.YQ"},
	}
	for _, tt := range tests {
		if got := bearerToken(tt.authorization); got != tt.want {
			t.Errorf("bearerToken(%q) = %q, want %q", tt.authorization, got, tt.want)
		}
	}
}

func TestWebsocketToken(t *testing.T) {
	const prefix = "base64url.bearer.authorization.k8s.io."
	tests := []struct {
		name      string
		protocols []string
		want      string
	}{
		{"none", nil, ""},
		{"empty", []string{""}, ""},
		{"no token among them", []string{"v5.channel.k8s.io, v4.channel.k8s.io"}, ""},
		{"before another", []string{prefix + "YWJj, v5.channel.k8s.io"}, "abc"},
		{"behind another", []string{"v5.channel.k8s.io," + prefix + "YWJj"}, "abc"},
		{"in a line of its own", []string{"v5.channel.k8s.io", prefix + "YWJj"}, "abc"},
		{"space around it", []string{" \t" + prefix + "YWJj\t , x"}, "abc"},
		{"an empty protocol is another", []string{"," + prefix + "YWJj"}, "abc"},
		{"of the URL alphabet", []string{prefix + "Pz8_Pj4-,x"}, "???>>>"},
		{"case of the prefix counts", []string{strings.ToUpper(prefix) + "YWJj, x"}, ""},
		{"the prefix without its dot", []string{strings.TrimSuffix(prefix, ".") + ", x"}, ""},
		// An empty token is none: forwarded, the request is anonymous.
		{"empty token", []string{prefix + ", x"}, ""},
		{"empty token alone", []string{prefix}, ""},
		// Errors: not anonymous, so they count as tokens, whatever they are.
		{"no other protocol", []string{prefix + "YWJj"}, prefix + "YWJj"},
		{"two tokens", []string{prefix + "YWJj, x", prefix + "ZGVm"}, prefix + "YWJj"},
		{"an empty and a full one", []string{prefix + ", " + prefix + "YWJj, x"}, prefix},
		{"a full and an empty one", []string{prefix + "YWJj, " + prefix + ", x"}, prefix + "YWJj"},
		{"padded", []string{prefix + "YWI=, x"}, prefix + "YWI="},
		{"of the wrong alphabet", []string{prefix + "+/+/, x"}, prefix + "+/+/"},
		{"cut off", []string{prefix + "YWJjZ, x"}, prefix + "YWJjZ"},
		{"not UTF-8", []string{prefix + "_w, x"}, prefix + "_w"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := websocketToken(tt.protocols); got != tt.want {
				t.Errorf("websocketToken(%q) = %q, want %q", tt.protocols, got, tt.want)
			}
		})
	}
}

func TestCredentialNames(t *testing.T) {
	names := map[Credential]string{Anonymous: "anonymous", Unproven: "unproven_token", Token: "token", Asserted: "certificate"}
	if len(names) != Credentials {
		t.Errorf("%d names for %d credentials", len(names), Credentials)
	}
	for c, want := range names {
		if c.String() != want {
			t.Errorf("credential %d is %q, want %q", c, c, want)
		}
	}
}

// A token is one word of what came in, behind the scheme; nothing else ever is.
func FuzzBearerToken(f *testing.F) {
	for _, s := range []string{"", "Bearer abc", "bearer  abc", "BEARER a b c", "\u00a0Bearer x", "Basic eA=="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, authorization string) {
		got := bearerToken(authorization)
		words := strings.Split(strings.TrimSpace(authorization), " ")
		want := ""
		if len(words) > 1 && strings.ToLower(words[0]) == "bearer" {
			want = words[1]
		}
		if got != want {
			t.Errorf("bearerToken(%q) = %q, want %q", authorization, got, want)
		}
	})
}

// What kube-apiserver would make anonymous must not pass for a token, and what it
// would read as a token must be found.
func FuzzWebsocketToken(f *testing.F) {
	f.Add("v5.channel.k8s.io", websocketTokenPrefix+"YWJj")
	f.Add(websocketTokenPrefix, "")
	f.Add(websocketTokenPrefix+"YQ,"+websocketTokenPrefix+"Yg", "x")
	f.Add(",", websocketTokenPrefix+"=")
	f.Fuzz(func(t *testing.T, first, second string) {
		got := websocketToken([]string{first, second})

		var tokens []string
		others := 0
		for _, p := range append(strings.Split(first, ","), strings.Split(second, ",")...) {
			if encoded, ok := strings.CutPrefix(strings.TrimSpace(p), websocketTokenPrefix); ok {
				tokens = append(tokens, encoded)
			} else {
				others++
			}
		}
		switch {
		case len(tokens) == 0:
			if got != "" {
				t.Errorf("a token %q out of nothing", got)
			}
		case len(tokens) > 1:
			if got == "" {
				t.Error("two tokens pass for none: anonymous, where kube-apiserver says 401")
			}
		default:
			decoded, err := base64.RawURLEncoding.DecodeString(tokens[0])
			switch good := err == nil && utf8.Valid(decoded); {
			case good && (others > 0 || len(decoded) == 0):
				if got != string(decoded) {
					t.Errorf("token %q, want %q", got, decoded)
				}
			case got == "":
				t.Errorf("the error %q passes for no token: anonymous, where kube-apiserver says 401", tokens[0])
			}
		}

		var e Edits
		e.withholdToken([]string{first, second})
		if e.dropProtocols != (len(tokens) > 0) {
			t.Errorf("dropProtocols is %v for %d tokens", e.dropProtocols, len(tokens))
		}
		for _, f := range e.Add {
			for p := range strings.SplitSeq(f.Value, ",") {
				if strings.HasPrefix(strings.TrimSpace(p), websocketTokenPrefix) {
					t.Errorf("a token is left in %q", f.Value)
				}
			}
		}
	})
}
