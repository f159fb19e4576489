package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// StatusError is an answer outside of 2xx.
type StatusError struct {
	Method, URL string
	Code        int
	Body        string
}

// Error implements error.
func (e *StatusError) Error() string {
	return fmt.Sprintf("%s %s: %d: %.500s", e.Method, e.URL, e.Code, e.Body)
}

// hasCode reports whether err is an answer with this status code.
func hasCode(err error, code int) bool {
	var s *StatusError
	return errors.As(err, &s) && s.Code == code
}

// fetch makes one request with a JSON body, or none where body is nil, and returns the
// body of a 2xx answer; any other answer is a *StatusError. A PATCH is a JSON merge patch.
func fetch(ctx context.Context, hc *http.Client, method, url string, body any) ([]byte, error) {
	var r io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, r)
	if err != nil {
		return nil, err
	}
	switch {
	case body != nil && method == http.MethodPatch:
		req.Header.Set("Content-Type", "application/merge-patch+json")
	case body != nil:
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := hc.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		return nil, &StatusError{Method: method, URL: url, Code: resp.StatusCode, Body: string(data)}
	}
	return data, nil
}

// Do makes a request to this apiserver as the admin. in, when not nil, is sent as JSON; the
// answer is decoded into out, when not nil. An answer outside of 2xx is a *StatusError.
func (a *Apiserver) Do(ctx context.Context, method, path string, in, out any) error {
	data, err := fetch(ctx, a.client, method, a.URL()+path, in)
	if err != nil || out == nil {
		return err
	}
	return json.Unmarshal(data, out)
}

// Create posts objects, each given with the path of its collection; one that exists
// already is left as it is.
func (a *Apiserver) Create(ctx context.Context, path string, object any) error {
	err := a.Do(ctx, http.MethodPost, path, object, nil)
	if hasCode(err, http.StatusConflict) {
		return nil
	}
	return err
}

// ServiceAccountToken returns a token of a service account, valid for an hour, by way of
// the TokenRequest API.
func (c *Cluster) ServiceAccountToken(ctx context.Context, namespace, name string) (string, error) {
	in := map[string]any{
		"apiVersion": "authentication.k8s.io/v1",
		"kind":       "TokenRequest",
		"spec":       map[string]any{"expirationSeconds": 3600},
	}
	var out struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	a, err := c.anyApiserver()
	if err != nil {
		return "", err
	}
	if err := a.Do(ctx, http.MethodPost, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+name+"/token", in, &out); err != nil {
		return "", err
	}
	return out.Status.Token, nil
}
