package http1

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"apiserver-lb/balancer"
)

// outcome is what a scanner makes of some bytes.
type outcome struct {
	ends    []int // of the messages, as offsets in the bytes
	refused string
	state   state // at the end
}

// scan feeds a scanner of requests, as many bytes at a time as step says.
func scan(t *testing.T, input []byte, step func() int) outcome {
	t.Helper()
	s := NewRequests(64 << 10)
	var o outcome
	for at := 0; at < len(input); {
		k := min(max(step(), 1), len(input)-at)
		n, refusal := s.Scan(input[at : at+k])
		if (n < k) != (refusal != nil) {
			t.Fatalf("%d of %d bytes pass, with the refusal %v", n, k, refusal)
		}
		at += n
		if refusal != nil {
			o.refused = refusal.Error()
			if more, again := s.Scan(input[at:]); more != 0 || again != refusal {
				t.Fatalf("after %v, %d bytes pass", refusal, more)
			}
			break
		}
		if k == 1 && s.state == startLine && s.size == 0 {
			o.ends = append(o.ends, at)
		}
	}
	o.state = s.state
	return o
}

func one() int { return 1 }

// FuzzRequests: what a scanner lets pass, net/http takes as well, with the same ends of
// messages; and the verdict does not depend on how the bytes are cut.
func FuzzRequests(f *testing.F) {
	for _, c := range requests {
		f.Add([]byte(c.Input), uint8(3))
	}
	f.Fuzz(func(t *testing.T, input []byte, step uint8) {
		byByte := scan(t, input, one)
		whole := scan(t, input, func() int { return len(input) })
		parts := scan(t, input, func() int { step = step*7 + 1; return int(step % 37) })
		if whole.refused != byByte.refused || parts.refused != byByte.refused || whole.state != byByte.state || parts.state != byByte.state {
			t.Fatalf("by bytes %+v, whole %+v, in parts %+v", byByte, whole, parts)
		}
		agrees(t, input, byByte)
	})
}

// agrees compares with net/http, message by message.
func agrees(t *testing.T, input []byte, o outcome) {
	t.Helper()
	begin := 0
	method := ""
	for _, end := range o.ends {
		message := input[begin:end]
		if method == "POST" && string(message) == "\r\n" {
			// net/http's server passes over it after a POST, ReadRequest does not.
			begin = end
			method = ""
			continue
		}
		in := bytes.NewReader(message)
		from := bufio.NewReaderSize(in, 4<<10)
		r, err := http.ReadRequest(from)
		if err != nil {
			t.Fatalf("net/http does not take %q: %v", message, err)
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Fatalf("net/http does not take the body of %q: %v", message, err)
		}
		if left := from.Buffered() + in.Len(); left != 0 {
			t.Fatalf("net/http leaves %d bytes of %q", left, message)
		}
		if r.Method == "CONNECT" || r.ProtoMajor != 1 || r.Header.Get("Content-Length") != "" && len(r.TransferEncoding) > 0 {
			t.Fatalf("%q passes", message)
		}
		if asked := strings.SplitN(string(message), " ", 3)[1]; r.RequestURI != asked {
			t.Fatalf("the target is %q, net/http takes it for %q", asked, r.RequestURI)
		}
		if balancer.BadHost(r.Host) != nil {
			t.Fatalf("%q passes, with the host %q", message, r.Host)
		}
		begin, method = end, r.Method
	}
}

// FuzzSpoil: where a scanner has refused, a server that reads what passed and then what
// spoils it finds no further request and no whole body.
func FuzzSpoil(f *testing.F) {
	for _, c := range requests {
		f.Add([]byte(c.Input))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		s := NewRequests(64 << 10)
		n, refusal := s.Scan(input)
		if refusal == nil {
			return
		}
		ends := scan(t, input, one).ends
		last := 0
		if len(ends) > 0 {
			last = ends[len(ends)-1]
		}
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(string(input[last:n]) + s.Spoil())))
		if err != nil {
			return
		}
		if s.InHead() {
			t.Fatalf("a head is whole in %q and %q", input[last:n], s.Spoil())
		}
		if body, err := io.ReadAll(r.Body); err == nil || err == io.ErrUnexpectedEOF {
			t.Fatalf("the body of %q with %q is %q, %v", input[last:n], s.Spoil(), body, err)
		}
	})
}
