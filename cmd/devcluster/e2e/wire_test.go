package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// relevant is of an answer what must be the same by both ways.
type relevant struct {
	Code   int
	Header http.Header // without what differs between any two answers
	Body   string
}

func relevantOf(a answer) relevant {
	h := a.Header.Clone()
	// Content-Length is a matter of framing: kube-apiserver sends some answers in
	// chunks over HTTP/1.1 whose length it tells over HTTP/2.
	for _, name := range []string{"Date", "Audit-Id", "Connection", "Content-Length"} {
		h.Del(name)
	}
	body := a.Body
	for _, server := range shared.Apiservers() { // GET /api tells which one answers
		body = strings.ReplaceAll(body, server.Address, "APISERVER")
	}
	body = listVersion.ReplaceAllString(body, `$1"VERSION"`) // others write meanwhile
	return relevant{a.Code, h, body}
}

// listVersion is where a list tells of which revision it is.
var listVersion = regexp.MustCompile(`^(\{"kind":"[A-Za-z]+List","apiVersion":"[^"]+","metadata":\{"resourceVersion":)"[0-9]+"`)

// TestTargets sends request targets byte by byte, as no client library would: what
// they mean is kube-apiserver's to say, and it must say the same through the
// balancer.
func TestTargets(t *testing.T) {
	namespaces := "/api/v1/namespaces"
	tests := []struct {
		method, target string
		refused        bool   // by the balancer: it is no target of a request, or names another host
		as             string // what is sent directly to compare with; empty: target
	}{
		{"GET", "/version", false, ""},
		{"GET", "/version?", false, ""},
		{"GET", "/version?a=1;b=2", false, ""},
		{"GET", "/version#fragment", false, ""},
		{"GET", "//version", false, ""},
		{"GET", "//api", false, ""},
		{"GET", "//api/v1", false, ""},
		{"GET", "///api", false, ""},
		{"GET", "//version?x=//y", false, ""},
		{"GET", "//", false, ""},
		{"GET", "/", false, ""},
		{"GET", "/api/", false, ""},
		{"GET", "/api//v1", false, ""},
		{"GET", "/api/v1/../v1", false, ""},
		{"GET", "/api/v1/../../version", false, ""},
		{"GET", "/../version", false, ""},
		{"GET", "/./version", false, ""},
		{"GET", "/api/%2e%2e/version", false, ""},
		{"GET", "/%76ersion", false, ""},
		{"GET", "/api%2fv1", false, ""},
		{"GET", "/api%2Fv1", false, ""},
		{"GET", namespaces + "/default%2fpods", false, ""},
		{"GET", namespaces + "/default%2Fpods/x", false, ""},
		{"GET", namespaces + "/kube%2Dsystem", false, ""},
		{"GET", namespaces + "/default/configmaps/a%00b", false, ""},
		{"GET", namespaces + "/default/configmaps/a%0d%0ab", false, ""},
		{"GET", namespaces + "/default/configmaps/a%25b", false, ""},
		{"GET", namespaces + "/default/configmaps/a%3Fb", false, ""},
		{"GET", namespaces + "/default/configmaps/a+b", false, ""},
		{"GET", namespaces + "/default/configmaps/a;b", false, ""},
		{"GET", namespaces + "/default/configmaps/a:b@c&d=e,f$g!h'(i)*j", false, ""},
		{"GET", namespaces + "/default/configmaps/\xc3\xbc", false, ""},
		{"GET", namespaces + "/default/configmaps/%C3%BC", false, ""},
		{"GET", namespaces + "/default/configmaps/\xff\xfe", false, ""},
		{"GET", namespaces + "/default/configmaps/[]{}|^`\"<>", false, ""},
		{"GET", namespaces + "/default/configmaps/back\\slash", false, ""},
		{"GET", namespaces + "/default/configmaps?limit=1;watch=true", false, ""},
		{"GET", namespaces + "/default/configmaps?fieldSelector=metadata.name=\xc3\xbc", false, ""},
		{"GET", namespaces + "/default/configmaps?fieldSelector=%zz", false, ""},
		{"GET", namespaces + "/default/configmaps?fieldSelector=metadata.name%3Dnone&limit=1&limit=2", false, ""},
		{"GET", namespaces + "/default/configmaps?fieldSelector=metadata.name%3Dnone?x=?", false, ""},
		{"GET", namespaces + "?labelSelector=a%20in%20(b,c)", false, ""},
		{"GET", namespaces + "?labelSelector=a+in+(b,c)", false, ""},
		{"GET", "/%zz", true, ""},
		{"GET", "/%", true, ""},
		{"GET", "https://kubernetes/version", false, ""},
		{"GET", "https://kubernetes//api", false, ""},
		{"GET", "https://elsewhere.example.com/version", true, ""},
		// An empty path is the path / (RFC 9110, section 4.2.3), and has to be sent as
		// that to a server (RFC 9112, section 3.2.1).
		{"GET", "https://kubernetes", false, "/"},
		{"GET", "https://kubernetes?x=1", false, "/?x=1"},
		{"GET", "http://Kubernetes/version?a=b", false, ""},
		{"GET", "http://kubernetes:1234/version?a=b", true, ""},
		{"GET", "version", true, ""},
		{"GET", "", true, ""},
		{"OPTIONS", "*", false, ""},
		{"GET", "*", false, ""},
		{"OPTIONS", "/version", false, ""},
		{"HEAD", "/version", false, ""},
		{"HEAD", namespaces, false, ""},
		{"HEAD", "/nothing", false, ""},
		{"FETCH", "/version", false, ""},
		{"POST", "/version", false, ""},
		{"PUT", namespaces, false, ""},
		{"DELETE", "//version", false, ""},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s %q", tt.method, tt.target), func(t *testing.T) {
			var got []relevant
			for _, s := range sides() {
				conn, from := dialRaw(t, s.url, caller{certificate: shared.PKI.Admin})
				conn.SetDeadline(time.Now().Add(20 * time.Second))
				target := tt.target
				if tt.as != "" && s.url != lb.URL {
					target = tt.as
				}
				fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: kubernetes\r\nUser-Agent: e2e\r\nConnection: close\r\n", tt.method, target)
				if tt.method != "GET" && tt.method != "HEAD" {
					io.WriteString(conn, "Content-Length: 0\r\n")
				}
				io.WriteString(conn, "\r\n")
				got = append(got, relevantOf(readRaw(t, from, tt.method)))
			}
			if tt.refused {
				if got[1].Code != http.StatusBadRequest {
					t.Errorf("the answer is %d %.300q, want 400", got[1].Code, got[1].Body)
				}
				return
			}
			if diff := cmp.Diff(got[0], got[1]); diff != "" {
				t.Errorf("through the balancer (+) and directly (-):\n%s", diff)
			}
		})
	}
}

// TestLargeHead sends 60 kB in one header field and in the URI.
func TestLargeHead(t *testing.T) {
	long := strings.Repeat("0123456789", 6000)
	for name, tt := range map[string]struct {
		path   string
		header http.Header
		want   int
	}{
		"header":       {"/version", http.Header{"X-Long": {long}}, http.StatusOK},
		"many headers": {"/version", http.Header{"X-Long": strings.SplitAfter(strings.Repeat(long[:99]+",", 600), ",")}, http.StatusOK},
		"query":        {"/version?x=" + long, nil, http.StatusOK},
		"path":         {"/api/v1/namespaces/" + long, nil, http.StatusNotFound},
		"selector":     {"/api/v1/namespaces?labelSelector=a+in+(" + strings.TrimSuffix(strings.Repeat("abcdefghi,", 6000), ",") + ")", nil, http.StatusOK},
	} {
		for _, protocol := range protocols {
			t.Run(name+"/"+protocol, func(t *testing.T) {
				var got []relevant
				for _, s := range sides() {
					c := caller{certificate: shared.PKI.Admin}.client(t, protocol)
					r := relevantOf(do(t, c, "GET", s.url+tt.path, "", tt.header))
					if name == "selector" {
						// The collection's resourceVersion moves on by itself.
						if !strings.Contains(r.Body, `"items":[]`) {
							t.Errorf("%s: %.300q", s.name, r.Body)
						}
						r.Body = ""
					}
					got = append(got, r)
				}
				if diff := cmp.Diff(got[0], got[1]); diff != "" {
					t.Errorf("through the balancer (+) and directly (-):\n%.2000s", diff)
				}
				if got[1].Code != tt.want {
					t.Errorf("the answer is %d %.300q, want %d", got[1].Code, got[1].Body, tt.want)
				}
			})
		}
	}
}

// TestExpectContinue has curl wait for 100 Continue before it sends a large body.
func TestExpectContinue(t *testing.T) {
	needTool(t, "curl")
	// The body is JSON that is mostly white space: etcd takes what it says.
	const name = "expected"
	body := fmt.Sprintf(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":%q},"data":{"a":"b"}%s}`, name, strings.Repeat(" ", 1_200_000))
	file := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(file, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, s := range sides() {
		for _, method := range []string{"POST", "PUT"} {
			// alice may not write: kube-apiserver refuses without asking for the body.
			for user, want := range map[string]string{"admin": "201", "alice": "403"} {
				t.Run(s.name+"/"+method+" "+user, func(t *testing.T) {
					if method == "PUT" && user == "admin" {
						want = "200"
					}
					url := s.url + "/api/v1/namespaces/default/configmaps"
					if method == "PUT" {
						url += "/" + name
					}
					args := []string{"-sS", "--http1.1", "--max-time", "20", "--expect100-timeout", "15", "-X", method, "--cacert", shared.PKI.File("ca.crt"),
						"-H", "Expect: 100-continue", "-H", "Content-Type: application/json", "-T", file,
						"-o", "/dev/null", "-w", "%{http_code} %{size_upload} %{time_total}"}
					if user == "admin" {
						cert, key := filepath.Join(t.TempDir(), "crt"), filepath.Join(t.TempDir(), "key")
						if err := shared.PKI.Admin.Write(cert, key); err != nil {
							t.Fatal(err)
						}
						args = append(args, "--cert", cert, "--key", key)
					} else {
						args = append(args, "-H", "Authorization: "+bearer(user))
					}
					out, err := command(t, 30*time.Second, "curl", append(args, url)...)
					if err != nil {
						t.Fatal(err)
					}
					var code string
					var sent int
					var took float64
					if _, err := fmt.Sscan(out, &code, &sent, &took); err != nil {
						t.Fatalf("%v: %q", err, out)
					}
					if code != want {
						t.Errorf("the answer is %s, want %s", code, want)
					}
					if user == "admin" && sent != len(body) {
						t.Errorf("curl sent %d bytes of %d", sent, len(body))
					}
					if user == "alice" && sent != 0 {
						t.Errorf("curl sent %d bytes, though the request was refused before", sent)
					}
					if took > 10 {
						t.Errorf("it took %v s: nobody said 100 Continue", took)
					}
				})
			}
		}
		if err := shared.Apiserver(1).Do(t.Context(), "DELETE", "/api/v1/namespaces/default/configmaps/"+name, nil, nil); err != nil {
			t.Error(err)
		}
	}
}

// TestHTTP1 speaks HTTP/1.1 and HTTP/1.0 by hand.
func TestHTTP1(t *testing.T) {
	admin := caller{certificate: shared.PKI.Admin}
	// reads answers the methods given, in order.
	exchange := func(t *testing.T, server, request string, methods ...string) (got []answer, from *bufio.Reader) {
		t.Helper()
		conn, from := dialRaw(t, server, admin)
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		for _, m := range methods {
			got = append(got, readRaw(t, from, m))
		}
		return got, from
	}
	const version = "GET /version HTTP/1.1\r\nHost: kubernetes\r\n\r\n"
	const namespace = "GET /api/v1/namespaces/default HTTP/1.1\r\nHost: kubernetes\r\n\r\n"
	review := func(head string) string {
		return "POST " + selfReviewPath + " HTTP/1.1\r\nHost: kubernetes\r\nContent-Type: application/json\r\n" + head + "\r\n"
	}
	var chunked strings.Builder
	for i := 0; i < len(selfReview); i += 7 {
		part := selfReview[i:min(i+7, len(selfReview))]
		fmt.Fprintf(&chunked, "%x\r\n%s\r\n", len(part), part)
	}
	chunked.WriteString("0\r\n\r\n")

	t.Run("keep-alive", func(t *testing.T) {
		conn, from := dialRaw(t, lb.URL, admin)
		for range 20 {
			io.WriteString(conn, version)
			if a := readRaw(t, from, "GET"); a.Code != http.StatusOK {
				t.Fatalf("%d %q", a.Code, a.Body)
			}
		}
	})
	tests := []struct {
		name, request string
		methods       []string
		codes         []int
		ends          bool // the server closes the connection
	}{
		{"two pipelined requests", version + namespace, []string{"GET", "GET"}, []int{200, 200}, false},
		{"a pipelined POST between", version + review(fmt.Sprintf("Content-Length: %d\r\n", len(selfReview))) + selfReview + namespace, []string{"GET", "POST", "GET"}, []int{200, 201, 200}, false},
		{"pipelined errors", strings.Replace(version, "/version", "/nothing", 1) + version, []string{"GET", "GET"}, []int{404, 200}, false},
		{"HEAD, then GET", strings.Replace(version, "GET", "HEAD", 1) + namespace, []string{"HEAD", "GET"}, []int{405, 200}, false},
		{"Connection: close", strings.Replace(version, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1), []string{"GET"}, []int{200}, true},
		{"HTTP/1.0", "GET /version HTTP/1.0\r\n\r\n", []string{"GET"}, []int{200}, true},
		{"HTTP/1.0 with Host and keep-alive", "GET /version HTTP/1.0\r\nHost: kubernetes\r\nConnection: keep-alive\r\n\r\n" + version, []string{"GET", "GET"}, []int{200, 200}, false},
		{"HTTP/1.0 with a body", strings.Replace(review(fmt.Sprintf("Content-Length: %d\r\n", len(selfReview))), "1.1", "1.0", 1) + selfReview, []string{"POST"}, []int{201}, true},
		{"chunked body", review("Transfer-Encoding: chunked\r\n") + chunked.String() + version, []string{"POST", "GET"}, []int{201, 200}, false},
		{"chunked body with a trailer", review("Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n") + strings.TrimSuffix(chunked.String(), "\r\n") + "X-Sum: 1\r\n\r\n" + version, []string{"POST", "GET"}, []int{201, 200}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var both [][]relevant
			for _, s := range sides() {
				got, from := exchange(t, s.url, tt.request, tt.methods...)
				var r []relevant
				for i, a := range got {
					if a.Code != tt.codes[i] {
						t.Errorf("%s: answer %d is %d %.300q, want %d", s.name, i+1, a.Code, a.Body, tt.codes[i])
					}
					r = append(r, relevantOf(a))
				}
				both = append(both, r)
				if tt.ends {
					if rest, err := io.ReadAll(from); err != nil || len(rest) > 0 {
						t.Errorf("%s: after the answer comes %q, %v, want the end", s.name, rest, err)
					}
				}
			}
			if diff := cmp.Diff(both[0], both[1]); diff != "" {
				t.Errorf("through the balancer (+) and directly (-):\n%s", diff)
			}
		})
	}
}

// TestMalformed sends what two servers might take for different things. kube-apiserver
// takes some of it; the balancer refuses all, ends the connection, and acts on nothing
// that comes behind.
func TestMalformed(t *testing.T) {
	const version = "GET /version HTTP/1.1\r\nHost: kubernetes\r\n"
	const behind = "GET /api HTTP/1.1\r\nHost: kubernetes\r\n\r\n"
	post := func(coding, body string) string {
		return "POST " + selfReviewPath + " HTTP/1.1\r\nHost: kubernetes\r\nContent-Type: application/json\r\nTransfer-Encoding: " + coding + "\r\n\r\n" + body
	}
	chunk := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(selfReview), selfReview)
	tests := []struct {
		name, request string
		direct        int // what kube-apiserver answers
		want          int
	}{
		{"length and coding", version + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200, 400},
		{"two lengths alike", version + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n", 200, 400},
		{"two lengths", version + "Content-Length: 0\r\nContent-Length: 1\r\n\r\n", 400, 400},
		{"signed length", version + "Content-Length: +0\r\n\r\n", 400, 400},
		{"folded field", version + "X: a\r\n b\r\n\r\n", 200, 400},
		{"bare LF", strings.ReplaceAll(version, "\r\n", "\n") + "\n", 200, 400},
		{"space before a colon", version + "Transfer-Encoding : chunked\r\n\r\n", 400, 400},
		{"VT before chunked", version + "Transfer-Encoding: \x0bchunked\r\n\r\n", 400, 400},
		{"unknown coding", post("gzip, chunked", chunk), 501, 501},
		{"coding in HTTP/1.0", strings.Replace(version, "1.1", "1.0", 1) + "Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n", 200, 400},
		{"hexadecimal prefix", post("chunked", "0x"+chunk), 500, 400},
		{"negative chunk", post("chunked", "-"+chunk), 500, 400},
		{"white space after a chunk size", post("chunked", strings.Replace(chunk, "\r\n", " \r\n", 1)), 201, 400},
		{"LF in a chunk extension", post("chunked", strings.Replace(chunk, "\r\n", ";a\nb\r\n", 1)), 500, 400},
		{"folded trailer", post("chunked", strings.TrimSuffix(chunk, "\r\n")+"X: a\r\n b\r\n\r\n"), 201, 400},
		{"no Host", "GET /version HTTP/1.1\r\n\r\n", 400, 400},
		{"two Hosts", version + "Host: kubernetes\r\n\r\n", 400, 400},
		{"another host in the target", strings.Replace(version, "/version", "https://elsewhere.example.com/version", 1) + "\r\n", 200, 400},
		{"CONNECT", "CONNECT kubernetes:443 HTTP/1.1\r\nHost: kubernetes:443\r\n\r\n", 404, 405},
		{"TRACE", strings.Replace(version, "GET", "TRACE", 1) + "\r\n", 405, 405},
		{"the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404, 505},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, s := range sides() {
				want := tt.direct
				if s.url == lb.URL {
					want = tt.want
				}
				conn, from := dialRaw(t, s.url, caller{certificate: shared.PKI.Admin})
				conn.SetDeadline(time.Now().Add(20 * time.Second))
				if _, err := io.WriteString(conn, tt.request+behind); err != nil {
					t.Fatal(err)
				}
				a := readRaw(t, from, "GET")
				if a.Code != want {
					t.Errorf("%s: the answer is %d %.300q, want %d", s.name, a.Code, a.Body, want)
				}
				if s.url != lb.URL {
					continue
				}
				if !strings.HasPrefix(a.Body, `{"kind":"Status"`) {
					t.Errorf("the answer is %.300q, want a Status", a.Body)
				}
				if rest, err := io.ReadAll(from); err != nil || len(rest) > 0 {
					t.Errorf("after the refusal comes %.300q, %v", rest, err)
				}
			}
		})
	}
}
